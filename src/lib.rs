//! Drava.

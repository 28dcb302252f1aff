//! Load for a node, limits of the machine, and reports that put one beside the other.
pub mod cpu;
pub mod latency;
pub mod limits;
pub mod measure;

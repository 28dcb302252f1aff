//! Load for a node, limits of the machine, and reports that put one beside the other.
pub mod blocking;
pub mod cli;
pub mod compare;
pub mod cpu;
pub mod latency;
pub mod limits;
pub mod load;
pub mod machine;
pub mod measure;
pub mod payload;
pub mod progress;
pub mod report;
pub mod schedule;
pub mod suite;
pub mod table;
pub mod verify;
pub mod witness;

//! The one door to glommio: nothing else in Drava names it, so that another release of it is one manifest line.
//!
//! - [`executor`] starts a pinned executor with the two guards that the runtime needs: a long preempt timer and a ticker.
//! - [`task`] spawns tasks whose panic is seen: glommio would let it unwind the whole executor.
//! - [`chunk`] has the receive buffers that are shared without a copy.
//! - [`local`] has the channels between tasks of one executor: no lock, no atomic.
//! - [`foreign`] has the channels between an executor and ordinary threads.
//! - [`memory`] tells the allocator to keep what is freed.
//! - [`time`] has timers that do not starve other tasks.
//! - [`net`], [`mod@file`] and [`mesh`] are glommio's own.

pub mod chunk;
pub mod executor;
pub mod foreign;
pub mod local;
pub mod memory;
pub mod task;
pub mod time;

/// TCP on the executor. Pass IP addresses: names would be resolved with blocking DNS.
pub mod net {
    pub use glommio::net::{AcceptedTcpStream, TcpListener, TcpStream};
}

/// O_DIRECT files on the executor.
pub mod file {
    pub use glommio::allocate_dma_buffer;
    pub use glommio::io::{DmaBuffer, DmaFile, OpenOptions, ReadResult};
}

/// Bounded single-producer single-consumer channels between executors.
pub mod mesh {
    pub use glommio::channels::shared_channel::{
        ConnectedReceiver, ConnectedSender, SharedReceiver, SharedSender, new_bounded,
    };
}

pub use executor::{Executor, ExecutorConfig, ExecutorHandle};
pub use glommio::GlommioError;
pub use task::{leave, spawn, spawn_caught, yield_if_needed, yield_now};

/// glommio's error as the `io::Error` that it mostly is.
pub fn io_error<T>(error: GlommioError<T>) -> std::io::Error {
    std::io::Error::from(error)
}

/// Permits shared by tasks of one executor, first come first served.
pub mod sync {
    pub use glommio::sync::{Semaphore, StaticPermit};
}

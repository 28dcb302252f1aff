//! The disk: durable writes and reads, past the page cache.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use drava_runtime::Executor;
use drava_runtime::file::{DmaFile, OpenOptions};

use super::{DurableWrite, LimitsError, cores, executor, join};
use crate::latency::{Latency, Quantiles};
use crate::measure::{MIB, Stretch};

const FILL_BYTES: usize = 1 << 20;
const DEPTH: usize = 4;

/// Makes a file of `bytes` whose blocks are all written and synced, so that later writes only change data.
pub fn prepare(path: &Path, bytes: u64) -> Result<(), LimitsError> {
    let path = path.to_owned();
    let (core, _) = cores();
    join(start(core, move || async move {
        let file = DmaFile::create(&path).await.map_err(fail("create the file"))?;
        let file = Rc::new(file);
        let position = Rc::new(Cell::new(0));
        let writers: Vec<_> = (0..DEPTH)
            .map(|_| {
                let (file, position) = (file.clone(), position.clone());
                drava_runtime::spawn(async move {
                    while let Some(at) = take_position(&position, FILL_BYTES as u64, bytes) {
                        let mut buffer = file.alloc_dma_buffer(FILL_BYTES);
                        // Not zeros: a disk may treat those as no data.
                        buffer.as_bytes_mut().fill(0xD5);
                        file.write_at(buffer, at).await.map_err(fail("fill the file"))?;
                    }
                    Ok::<(), LimitsError>(())
                })
            })
            .collect();
        for writer in writers {
            writer.await.expect("the executor runs on")?;
        }
        file.fdatasync().await.map_err(fail("sync the file"))?;
        Ok(())
    })?)
}

/// The next piece of a file that ends at `end`.
fn take_position(position: &Cell<u64>, size: u64, end: u64) -> Option<u64> {
    let at = position.get();
    position.set(at + size);
    (at + size <= end).then_some(at)
}

/// Writes over `path` with one and with four writes in flight.
pub fn durable_writes(
    path: &Path,
    file_bytes: u64,
    write_bytes: usize,
    stretch: Stretch,
) -> Result<DurableWrite, LimitsError> {
    let (latency, _) = overwrite(path, file_bytes, write_bytes, 1, stretch)?;
    let (_, depth_4_mib_per_s) = overwrite(path, file_bytes, write_bytes, DEPTH, stretch)?;
    Ok(DurableWrite { write_bytes, latency, depth_4_mib_per_s })
}

fn overwrite(
    path: &Path,
    file_bytes: u64,
    write_bytes: usize,
    depth: usize,
    stretch: Stretch,
) -> Result<(Quantiles, f64), LimitsError> {
    let path = path.to_owned();
    let (core, _) = cores();
    join(start(core, move || async move {
        let file = Rc::new(open_durable(&path).await?);
        let position = Rc::new(Cell::new(0u64));
        let latency = Rc::new(RefCell::new(Latency::default()));
        let writes = Rc::new(Cell::new(0u64));
        let from = Instant::now() + stretch.warm_up;
        let until = from + stretch.measured;
        let writers: Vec<_> = (0..depth)
            .map(|_| {
                let (file, position, latency, writes) =
                    (file.clone(), position.clone(), latency.clone(), writes.clone());
                drava_runtime::spawn(async move {
                    loop {
                        let at = take_position(&position, write_bytes as u64, file_bytes).unwrap_or_else(|| {
                            position.set(write_bytes as u64);
                            0
                        });
                        let mut buffer = file.alloc_dma_buffer(write_bytes);
                        buffer.as_bytes_mut()[..8].copy_from_slice(&at.to_le_bytes());
                        let began = Instant::now();
                        file.write_at(buffer, at).await.map_err(fail("write durably"))?;
                        let ended = Instant::now();
                        if until <= ended {
                            return Ok::<(), LimitsError>(());
                        }
                        if from <= began {
                            latency.borrow_mut().record(ended - began);
                            writes.set(writes.get() + 1);
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.expect("the executor runs on")?;
        }
        let mib_per_s = writes.get() as f64 * write_bytes as f64 / MIB / stretch.measured.as_secs_f64();
        let quantiles = latency.borrow().quantiles();
        Ok((quantiles, mib_per_s))
    })?)
}

/// Reads `path` from its start, again and again, in pieces of 1 MiB with four in flight.
pub fn sequential_read(path: &Path, file_bytes: u64, stretch: Stretch) -> Result<f64, LimitsError> {
    let path = path.to_owned();
    let (core, _) = cores();
    join(start(core, move || async move {
        let file = Rc::new(DmaFile::open(&path).await.map_err(fail("open the file to read"))?);
        let position = Rc::new(Cell::new(0u64));
        let read = Rc::new(Cell::new(0u64));
        let from = Instant::now() + stretch.warm_up;
        let until = from + stretch.measured;
        let readers: Vec<_> = (0..DEPTH)
            .map(|_| {
                let (file, position, read) = (file.clone(), position.clone(), read.clone());
                drava_runtime::spawn(async move {
                    loop {
                        let at = take_position(&position, FILL_BYTES as u64, file_bytes).unwrap_or_else(|| {
                            position.set(FILL_BYTES as u64);
                            0
                        });
                        let began = Instant::now();
                        let piece = file.read_at_aligned(at, FILL_BYTES).await.map_err(fail("read"))?;
                        if until <= Instant::now() {
                            return Ok::<(), LimitsError>(());
                        }
                        if from <= began {
                            read.set(read.get() + piece.len() as u64);
                        }
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.await.expect("the executor runs on")?;
        }
        Ok(read.get() as f64 / MIB / stretch.measured.as_secs_f64())
    })?)
}

/// Opens a file for writes that are durable when they return.
pub async fn open_durable(path: &PathBuf) -> Result<DmaFile, LimitsError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DSYNC);
    options.dma_open(path).await.map_err(fail("open the file for durable writes"))
}

fn start<G, F, T>(core: usize, work: G) -> Result<drava_runtime::ExecutorHandle<Result<T, LimitsError>>, LimitsError>
where
    G: FnOnce() -> F + Send + 'static,
    F: Future<Output = Result<T, LimitsError>> + 'static,
    T: Send + 'static,
{
    Executor::start(executor("limits-disk", core), move || async move {
        // The ticker at its fast pace, as on a data core under load.
        let ticking = drava_runtime::spawn(async {
            loop {
                drava_runtime::executor::mark_active();
                drava_runtime::time::sleep(Duration::from_millis(500)).await;
            }
        });
        let result = work().await;
        drop::<drava_runtime::task::TaskHandle<std::convert::Infallible>>(ticking);
        result
    })
    .map_err(LimitsError::io("start an executor"))
}

fn fail<T>(what: &'static str) -> impl FnOnce(drava_runtime::GlommioError<T>) -> LimitsError {
    move |error| LimitsError::Io { what, source: drava_runtime::io_error(error) }
}

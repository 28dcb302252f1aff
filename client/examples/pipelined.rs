//! Publishes many records without waiting for each, and checks every receipt.
//!
//! ```sh
//! cargo run --release -p drava-client --example pipelined -- 127.0.0.1:7400 orders 1000000
//! ```

use std::collections::VecDeque;
use std::error::Error;
use std::time::{Duration, Instant};

use drava_client::{Client, TopicPolicy};

/// Receipts that are not looked at yet.
const PENDING_MAX: usize = 50_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:7400".to_owned());
    let topic = arguments.next().unwrap_or_else(|| "orders".to_owned());
    let count: u64 = arguments.next().map_or(Ok(1_000_000), |count| count.parse())?;

    let client = Client::connect(address).await?;
    client.ensure_topic(&topic, TopicPolicy::default()).await?;
    let linger = Duration::from_millis(1);
    let producer = client.producer(&topic).batch_bytes(128 * 1024).linger(linger).build().await?;

    let started = Instant::now();
    let mut pending = VecDeque::new();
    for number in 0..count {
        // Waits only while the window is full: that is the node's way to say that this is fast enough.
        pending.push_back(producer.enqueue(format!("record {number}")).await?);
        if pending.len() == PENDING_MAX
            && let Some(oldest) = pending.pop_front()
        {
            oldest.await?;
        }
    }
    producer.flush().await?;
    for receipt in pending {
        receipt.await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{count} records acknowledged in {seconds:.2} s, {:.0} a second", count as f64 / seconds);
    Ok(())
}

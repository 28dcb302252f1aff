//! Consumes a durable subscription until Ctrl-C. Started again, it goes on where it was acknowledged.
//!
//! ```sh
//! cargo run --release -p drava-client --example subscribe -- 127.0.0.1:7400 orders billing
//! ```

use std::error::Error;

use drava_client::Client;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:7400".to_owned());
    let topic = arguments.next().unwrap_or_else(|| "orders".to_owned());
    let subscription = arguments.next().unwrap_or_else(|| "billing".to_owned());

    let client = Client::connect(address).await?;
    let mut consumer = client.subscribe(topic, subscription).build().await?;
    loop {
        let message = tokio::select! {
            message = consumer.next() => message?,
            _ = tokio::signal::ctrl_c() => break,
        };
        println!("{}/{} {}", message.partition, message.offset, String::from_utf8_lossy(&message.payload));
        // This message and all before it in its partition are done.
        consumer.ack(&message);
    }
    // Acks are sent soon; closing waits until the cursor is durable.
    consumer.close().await?;
    Ok(())
}

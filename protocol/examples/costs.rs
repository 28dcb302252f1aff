//! Prints what the hot path of the protocol costs: `cargo run --release -p drava-protocol --example costs`.

use std::hint::black_box;
use std::time::Instant;

use drava_protocol::batch::{self, Builder, NewRecord, Seal};
use drava_protocol::frame;
use drava_protocol::message::{self, Publish, Published};

const TURNS: u32 = 1_000_000;

fn main() {
    let mut out = Vec::with_capacity(4096);
    measure("encode Published", || {
        out.clear();
        frame::encode(black_box(&Published { base_offset: 7, duplicate: false }), 0, 9, 0, &mut out);
        black_box(&out);
    });
    measure("decode Published", || {
        black_box(frame::decode(black_box(&out), 0).is_ok());
    });

    let publish = frame_of(&Publish { partition: 7 });
    measure("decode and access Publish", || {
        let Ok(frame::Decoded::Frame(frame, _)) = frame::decode(black_box(&publish), 0) else { unreachable!() };
        black_box(message::access::<Publish>(frame.body).expect("valid").partition.to_native());
    });

    let mut builder = Builder::new(2048);
    builder.push(&NewRecord { payload: &[7; 1024], ..NewRecord::default() }).expect("it fits");
    let mut sealed = Vec::new();
    builder.seal(&Seal::default(), &mut sealed);
    measure("check a batch of 1 KiB", || {
        black_box(batch::check(black_box(&sealed)).is_ok());
    });
}

fn frame_of<M: message::Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    frame::encode(message, 0, 1, 0, &mut out);
    out
}

fn measure(what: &str, mut turn: impl FnMut()) {
    for _ in 0..TURNS / 10 {
        turn();
    }
    let start = Instant::now();
    for _ in 0..TURNS {
        turn();
    }
    println!("{what}: {:.1} ns", start.elapsed().as_secs_f64() * 1e9 / f64::from(TURNS));
}

//! A body of every kind: the first byte chooses which.
#![no_main]

use std::fmt::Debug;

use drava_protocol::frame::{self, Decoded};
use drava_protocol::message::*;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((number, body)) = data.split_first() else { return };
    let kind = Kind::ALL[*number as usize % Kind::ALL.len()];
    match kind {
        Kind::Hello => read::<Hello>(body),
        Kind::Welcome => read::<Welcome>(body),
        Kind::Error => read::<Error>(body),
        Kind::Ping => read::<Ping>(body),
        Kind::Pong => read::<Pong>(body),
        Kind::Done => read::<Done>(body),
        Kind::CreateTopic => read::<CreateTopic>(body),
        Kind::DeleteTopic => read::<DeleteTopic>(body),
        Kind::ListTopics => read::<ListTopics>(body),
        Kind::Topics => read::<Topics>(body),
        Kind::Lookup => read::<Lookup>(body),
        Kind::Topic => read::<Topic>(body),
        Kind::DescribePartition => read::<DescribePartition>(body),
        Kind::PartitionState => read::<PartitionState>(body),
        Kind::OpenProducer => read::<OpenProducer>(body),
        Kind::ProducerOpened => read::<ProducerOpened>(body),
        Kind::Publish => read::<Publish>(body),
        Kind::Published => read::<Published>(body),
        Kind::Fetch => read::<Fetch>(body),
        Kind::Fetched => read::<Fetched>(body),
        Kind::Damaged => read::<Damaged>(body),
        Kind::Locate => read::<Locate>(body),
        Kind::Located => read::<Located>(body),
        Kind::Subscribe => read::<Subscribe>(body),
        Kind::Subscribed => read::<Subscribed>(body),
        Kind::Flow => read::<Flow>(body),
        Kind::Deliver => read::<Deliver>(body),
        Kind::Ack => read::<Ack>(body),
        Kind::Seek => read::<Seek>(body),
        Kind::CloseConsumer => read::<CloseConsumer>(body),
        Kind::DeleteSubscription => read::<DeleteSubscription>(body),
    }
});

/// Walks through all that the archive holds; what can be read can be sent, and comes back the same.
fn read<M: Body + PartialEq + Debug>(body: &[u8])
where
    M::Archived: Debug,
{
    let Ok(archived) = access::<M>(body) else {
        assert!(decode::<M>(body).is_err());
        return;
    };
    let walked = format!("{archived:?}");
    assert!(!walked.is_empty());
    let message = decode::<M>(body).expect("what can be accessed can be copied out");
    let mut bytes = Vec::new();
    if frame::try_encode(&message, 0, 1, 0, &mut bytes).is_err() {
        return;
    }
    let Ok(Decoded::Frame(frame, _)) = frame::decode(&bytes, 0) else { panic!("an encoded frame does not decode") };
    assert_eq!(decode::<M>(frame.body).as_ref(), Ok(&message));
}

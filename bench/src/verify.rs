//! Whether what came is what was sent: nothing lost, nothing twice, in order, unchanged.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::payload::{PayloadError, Stamp, check};

/// Gaps of one stream that are remembered. Beyond that, messages that come late count as duplicates.
const GAPS_MAX: usize = 10_000;

/// What was found. All but `messages` and `foreign` are faults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    pub messages: u64,
    /// Acknowledged or passed over, and never delivered.
    pub lost: u64,
    pub duplicated: u64,
    /// Delivered after a later message of its stream.
    pub reordered: u64,
    /// The payload does not match its checksum.
    pub corrupt: u64,
    /// Offsets that were skipped or repeated in a partition.
    pub offset_gaps: u64,
    /// Not stamped by this load generator, or by another run of it.
    pub foreign: u64,
    /// The first fault, in words.
    pub first_fault: Option<String>,
}

impl Findings {
    pub fn faults(&self) -> u64 {
        self.lost + self.duplicated + self.reordered + self.corrupt + self.offset_gaps
    }

    pub fn add(&mut self, other: &Findings) {
        self.messages += other.messages;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.corrupt += other.corrupt;
        self.offset_gaps += other.offset_gaps;
        self.foreign += other.foreign;
        if self.first_fault.is_none() {
            self.first_fault.clone_from(&other.first_fault);
        }
    }

    fn fault(&mut self, say: impl FnOnce() -> String) {
        self.first_fault.get_or_insert_with(say);
    }
}

/// Which streams belong to a run: the upper half of a stream's number is that of its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Only this run; its streams start at 0.
    Run(u32),
    /// Whatever lies in the topics. A stream starts where it is first seen.
    Anything,
}

pub fn stream_id(run: u32, stream: u32) -> u64 {
    u64::from(run) << 32 | u64::from(stream)
}

/// Looks at every message of the partitions of one consumer.
#[derive(Debug)]
pub struct Verifier {
    expect: Expect,
    streams: FxHashMap<u64, Stream>,
    findings: Findings,
}

#[derive(Debug, Default)]
struct Stream {
    next: u64,
    /// Passed over and not seen since: first and one past the last.
    gaps: BTreeMap<u64, u64>,
}

impl Verifier {
    pub fn new(expect: Expect) -> Verifier {
        Verifier { expect, streams: FxHashMap::default(), findings: Findings::default() }
    }

    /// Takes the next message of a partition. Returns its stamp if it is one of ours, damaged or not in order as it
    /// may be.
    pub fn message(&mut self, payload: &[u8]) -> Option<Stamp> {
        let stamp = match check(payload) {
            Ok(stamp) => stamp,
            Err(PayloadError::Foreign) => {
                self.findings.foreign += 1;
                return None;
            }
            Err(error @ PayloadError::Checksum { .. }) => {
                self.findings.messages += 1;
                self.findings.corrupt += 1;
                self.findings.fault(|| error.to_string());
                return None;
            }
        };
        if let Expect::Run(run) = self.expect
            && (stamp.stream >> 32) as u32 != run
        {
            self.findings.foreign += 1;
            return None;
        }
        self.findings.messages += 1;
        self.place(&stamp);
        Some(stamp)
    }

    fn place(&mut self, stamp: &Stamp) {
        let from_start = matches!(self.expect, Expect::Run(_));
        let first = if from_start { 0 } else { stamp.sequence };
        let stream = self.streams.entry(stamp.stream).or_insert_with(|| Stream { next: first, gaps: BTreeMap::new() });
        let sequence = stamp.sequence;
        if sequence == stream.next {
            stream.next += 1;
            return;
        }
        let (next, name) = (stream.next, stamp.stream);
        if next < sequence {
            if stream.gaps.len() < GAPS_MAX {
                stream.gaps.insert(next, sequence);
            }
            stream.next = sequence + 1;
            self.findings.lost += sequence - next;
            self.findings.fault(|| format!("stream {name:016x} goes from {next} to {sequence}"));
        } else if stream.fill(sequence) {
            self.findings.lost -= 1;
            self.findings.reordered += 1;
            self.findings.fault(|| format!("stream {name:016x} has {sequence} after {}", next - 1));
        } else {
            self.findings.duplicated += 1;
            self.findings.fault(|| format!("stream {name:016x} has {sequence} twice, before {next}"));
        }
    }

    /// A batch of `count` messages begins at `offset` where `expected` was next.
    pub fn offsets(&mut self, expected: u64, offset: u64) {
        if expected != offset {
            self.findings.offset_gaps += 1;
            self.findings.fault(|| format!("offset {offset} came where {expected} was next"));
        }
    }

    /// Reading starts over: every stream begins where it is seen next.
    pub fn restart(&mut self) {
        self.streams.clear();
    }

    /// Takes over what another has seen of other streams.
    pub fn merge(&mut self, other: Verifier) {
        self.streams.extend(other.streams);
        self.findings.add(&other.findings);
    }

    /// Ends the look: `acknowledged` messages of each stream had to come.
    pub fn finish(mut self, acknowledged: impl IntoIterator<Item = (u64, u64)>) -> Findings {
        for (stream, messages) in acknowledged {
            let seen = self.streams.get(&stream).map_or(0, |stream| stream.next);
            if seen < messages {
                self.findings.lost += messages - seen;
                self.findings.fault(|| format!("stream {stream:016x} ends at {seen}; {messages} were acknowledged"));
            }
        }
        self.findings
    }
}

impl Stream {
    /// Takes `sequence` out of the gaps; false if it lies in none.
    fn fill(&mut self, sequence: u64) -> bool {
        let Some((&from, &to)) = self.gaps.range(..=sequence).next_back() else { return false };
        if to <= sequence {
            return false;
        }
        self.gaps.remove(&from);
        if from < sequence {
            self.gaps.insert(from, sequence);
        }
        if sequence + 1 < to {
            self.gaps.insert(sequence + 1, to);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::{Batches, KEY_BYTES, Next, Shape};
    use drava_protocol::batch::{Compression, Records};

    const RUN: u32 = 9;

    fn payload(stream: u64, sequence: u64) -> Vec<u8> {
        let shape = Shape { message_bytes: 64, batch: 1, keyed: false, compression: Compression::None };
        let next = Next { stream, sequence, sent_ns: 5, event_time_ms: 0 };
        let mut bytes = Vec::new();
        Batches::new(shape, 0, 0).append(&next, || [0; KEY_BYTES], &mut bytes);
        let records = Records::open(&bytes, 1 << 20).unwrap();
        records.iter().next().unwrap().unwrap().payload.to_vec()
    }

    fn look(expect: Expect, sequences: &[u64], acknowledged: u64) -> Findings {
        let stream = stream_id(RUN, 1);
        let mut verifier = Verifier::new(expect);
        for &sequence in sequences {
            verifier.message(&payload(stream, sequence));
        }
        verifier.finish([(stream, acknowledged)])
    }

    #[test]
    fn a_whole_stream_has_no_fault() {
        let findings = look(Expect::Run(RUN), &[0, 1, 2, 3], 4);
        assert_eq!((findings.messages, findings.faults(), findings.first_fault), (4, 0, None));
    }

    #[test]
    fn loss_in_the_middle_at_the_start_and_at_the_end_is_seen() {
        assert_eq!(look(Expect::Run(RUN), &[0, 1, 4], 5).lost, 2);
        assert_eq!(look(Expect::Run(RUN), &[3, 4], 5).lost, 3);
        assert_eq!(look(Expect::Run(RUN), &[0, 1], 5).lost, 3);
        assert_eq!(look(Expect::Run(RUN), &[], 5).lost, 5);
        let findings = look(Expect::Run(RUN), &[0, 2], 3);
        assert_eq!(findings.first_fault.unwrap(), "stream 0000000900000001 goes from 1 to 2");
    }

    #[test]
    fn a_duplicate_is_seen() {
        let findings = look(Expect::Run(RUN), &[0, 1, 1, 2, 0], 3);
        assert_eq!((findings.duplicated, findings.lost, findings.reordered), (2, 0, 0));
    }

    #[test]
    fn reordering_is_neither_loss_nor_a_duplicate() {
        let findings = look(Expect::Run(RUN), &[0, 3, 2, 1, 4, 2], 5);
        assert_eq!((findings.reordered, findings.lost, findings.duplicated), (2, 0, 1));
    }

    #[test]
    fn a_changed_payload_is_seen() {
        let stream = stream_id(RUN, 1);
        let mut verifier = Verifier::new(Expect::Run(RUN));
        let mut damaged = payload(stream, 0);
        damaged[3] ^= 1;
        assert_eq!(verifier.message(&damaged), None);
        let findings = verifier.finish([]);
        assert_eq!((findings.corrupt, findings.messages), (1, 1));
    }

    #[test]
    fn messages_of_others_are_counted_apart() {
        let mut verifier = Verifier::new(Expect::Run(RUN));
        verifier.message(b"a message of somebody else");
        verifier.message(&payload(stream_id(RUN + 1, 1), 17));
        let findings = verifier.finish([]);
        assert_eq!((findings.foreign, findings.messages, findings.faults()), (2, 0, 0));
    }

    #[test]
    fn without_a_run_a_stream_starts_where_it_is_first_seen() {
        assert_eq!(look(Expect::Anything, &[100, 101, 103], 0).lost, 1);
    }

    #[test]
    fn offsets_that_jump_are_seen() {
        let mut verifier = Verifier::new(Expect::Anything);
        verifier.offsets(5, 5);
        verifier.offsets(6, 8);
        assert_eq!(verifier.finish([]).offset_gaps, 1);
    }
}

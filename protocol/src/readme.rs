//! Compares `protocol/README.md` with the code: its tables with the enums and archives, its examples byte by byte.

use std::fmt::Write;

use crate::batch::{Builder, NewRecord, Seal, broker_fields};
use crate::error::{CODES, Retry};
use crate::frame::{self, Decoded};
use crate::message::{self, Hello, KINDS, LAYOUTS, Publish};

const README: &str = include_str!("../README.md");

fn assert_drawn(what: &str, drawn: &str) {
    assert!(README.contains(drawn), "{what} in protocol/README.md should read:\n\n{drawn}");
}

/// Doc comments come as they stand in the source: each line begins with a space.
fn doc(text: &str) -> &str {
    text.trim()
}

fn kinds() -> String {
    let mut out = "| number | kind | meaning |\n|---|---|---|\n".to_owned();
    for (number, name, meaning) in KINDS {
        writeln!(out, "| {number} | `{name}` | {} |", doc(meaning)).unwrap();
    }
    out
}

fn codes() -> String {
    let mut out = "| number | code | try again | closes | meaning |\n|---|---|---|---|---|\n".to_owned();
    for (code, meaning) in CODES {
        let retry = match code.retry() {
            Retry::No => "no",
            Retry::Here => "here",
            Retry::Elsewhere => "elsewhere",
        };
        let closes = if code.closes_connection() { "yes" } else { "no" };
        writeln!(out, "| {} | `{code:?}` | {retry} | {closes} | {} |", *code as u16, doc(meaning)).unwrap();
    }
    out
}

fn layouts() -> String {
    let mut out = String::new();
    for layout in LAYOUTS {
        if layout.fields.is_empty() {
            writeln!(out, "**{}**: no fields, 0 bytes.\n", layout.name).unwrap();
            continue;
        }
        writeln!(out, "**{}**: {} bytes.\n\n| at | field | type | |\n|---|---|---|---|", layout.name, layout.bytes)
            .unwrap();
        for field in layout.fields {
            writeln!(out, "| {} | `{}` | `{}` | {} |", field.offset, field.name, field.kind, doc(field.doc)).unwrap();
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (index, line) in bytes.chunks(16).enumerate() {
        write!(out, "{:04x} ", index * 16).unwrap();
        for byte in line {
            write!(out, " {byte:02x}").unwrap();
        }
        out.push('\n');
    }
    out
}

/// The frame of the worked example: one record, published to partition 7.
fn publish() -> Vec<u8> {
    let mut builder = Builder::new(1024);
    builder
        .push(&NewRecord {
            event_time_ms: 1_700_000_000_000,
            key: Some(b"k1"),
            headers: &[("h", b"v")],
            payload: b"hello",
            ..NewRecord::default()
        })
        .unwrap();
    let mut batch = Vec::new();
    builder.seal(&Seal { producer: 42, producer_epoch: 1, base_sequence: 100, ..Seal::default() }, &mut batch);
    let mut out = Vec::new();
    frame::encode(&Publish { partition: 7 }, 0, 1, batch.len() as u32, &mut out);
    out.extend_from_slice(&batch);
    out.extend_from_slice(frame::padding(batch.len()));
    out
}

fn hello() -> Vec<u8> {
    let mut out = Vec::new();
    let hello =
        Hello { version_min: 1, version_max: 1, client: "example-client/1".into(), token: Some("secret".into()) };
    frame::encode(&hello, 0, 0, 0, &mut out);
    let Ok(Decoded::Frame(frame, _)) = frame::decode(&out, 0) else { panic!("the frame does not decode") };
    frame.body.to_vec()
}

#[test]
fn the_kinds_are_those_of_the_code() {
    assert_eq!(KINDS.len(), message::Kind::ALL.len());
    assert_drawn("the table of kinds", &kinds());
    assert!(KINDS.iter().all(|(_, _, meaning)| !meaning.is_empty()), "every kind has a meaning");
    for number in 0..=u8::MAX {
        let kind = message::Kind::from_number(number);
        assert!(kind.is_none_or(|kind| kind as u8 == number));
    }
}

#[test]
fn the_error_codes_are_those_of_the_code() {
    assert_drawn("the table of error codes", &codes());
    for (code, meaning) in CODES {
        assert!(!meaning.is_empty(), "{code:?} has a meaning");
        assert_eq!(crate::ErrorCode::from_number(*code as u16), Some(*code));
    }
}

#[test]
fn the_archives_are_those_of_the_code() {
    assert_drawn("the section on bodies", &layouts());
}

#[test]
fn the_examples_are_those_of_the_code() {
    let publish = publish();
    assert!(matches!(frame::decode(&publish, 1024), Ok(Decoded::Frame(_, taken)) if taken == publish.len()));
    assert_drawn("the frame", &hex(&publish));
    assert_drawn("the body of a Hello", &hex(&hello()));
    let fields = broker_fields(1000, 1_700_000_000_123);
    assert_drawn("the broker's fields", &hex(&fields));
}

//! A message as one line of JSON.

use drava_client::Message;
use serde_json::{Value, json};

/// Bytes that are text stay text; others become Base64, and the field's name says so.
pub fn message(message: &Message) -> Value {
    let mut value = json!({
        "partition": message.partition,
        "offset": message.offset,
        "event_time_ms": message.event_time_ms,
        "append_time_ms": message.append_time_ms,
    });
    if let Some(key) = &message.key {
        put(&mut value, "key", key);
    }
    if !message.headers.is_empty() {
        let headers = message.headers.iter().map(|header| {
            let mut pair = json!({ "name": header.name });
            put(&mut pair, "value", &header.value);
            pair
        });
        value["headers"] = headers.collect();
    }
    if let Some(deliver_at_ms) = message.deliver_at_ms {
        value["deliver_at_ms"] = deliver_at_ms.into();
    }
    put(&mut value, "payload", &message.payload);
    value
}

fn put(object: &mut Value, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object[name] = text.into(),
        Err(_) => object[format!("{name}_base64")] = base64(bytes).into(),
    }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for index in 0..4 {
            let sextet = bits >> (18 - 6 * index) & 63;
            out.push(if index <= group.len() { char::from(LETTERS[sextet as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")];
        for (plain, packed) in cases {
            assert_eq!(base64(plain.as_bytes()), packed);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn text_stays_text_and_other_bytes_are_named_as_packed() {
        let mut value = json!({});
        put(&mut value, "key", b"a\"b");
        put(&mut value, "payload", &[0xff]);
        assert_eq!(value, json!({ "key": "a\"b", "payload_base64": "/w==" }));
    }
}

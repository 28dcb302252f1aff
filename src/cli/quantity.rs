//! Amounts as people write them.

use drava_client::{CachePolicy, Place};
use jiff::Timestamp;

use crate::config::option::{CACHE_EXPECTED, parse_bytes, parse_cache};

/// `64 MiB`, `4096`.
pub fn bytes(text: &str) -> Result<u64, String> {
    parse_bytes(text).ok_or_else(|| "expected a number of bytes, such as 65536, 64KiB or 1MiB".to_owned())
}

/// `shared`, `none`, `64MiB`, `10%`.
pub fn cache(text: &str) -> Result<CachePolicy, String> {
    parse_cache(text).ok_or_else(|| CACHE_EXPECTED.to_owned())
}

/// `90s`, `15m`, `12h`, `7d`, `500ms`; in milliseconds. `0` has no unit.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit_ms = match &text[digits..] {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        "" if text == "0" => Some(1),
        _ => None,
    };
    text[..digits]
        .parse::<u64>()
        .ok()
        .zip(unit_ms)
        .and_then(|(number, unit_ms)| number.checked_mul(unit_ms))
        .ok_or_else(|| "expected a time with its unit, such as 90s, 15m, 12h or 7d".to_owned())
}

/// `earliest`, `latest`, `offset:10`, `time:1700000000000`, `time:2026-11-21T10:00:00Z`, `time:-10m`.
pub fn place(text: &str) -> Result<Place, String> {
    place_at(text, Timestamp::now())
}

fn place_at(text: &str, now: Timestamp) -> Result<Place, String> {
    let expected = || "expected earliest, latest, offset:NUMBER or time:WHEN".to_owned();
    match text.split_once(':') {
        None if text == "earliest" => Ok(Place::Earliest),
        None if text == "latest" => Ok(Place::Latest),
        Some(("offset", offset)) => offset.parse().map(Place::Offset).map_err(|_| expected()),
        Some(("time", time)) => time_ms(time, now).map(Place::Time),
        None | Some(_) => Err(expected()),
    }
}

/// Milliseconds since 1970. Times before that are 1970.
fn time_ms(text: &str, now: Timestamp) -> Result<u64, String> {
    let since_1970 = |time: Timestamp| u64::try_from(time.as_millisecond()).unwrap_or(0);
    if let Some(ago) = text.strip_prefix('-') {
        return duration_ms(ago).map(|ago_ms| since_1970(now).saturating_sub(ago_ms));
    }
    text.parse().or_else(|_| text.parse().map(since_1970)).map_err(|_| {
        "expected time:2026-11-21T10:00:00Z, with Z or an offset such as +02:00, time:-10m for ten minutes ago, or \
         time:MILLISECONDS since 1970"
            .to_owned()
    })
}

/// Bytes with the escapes `\n`, `\r`, `\t`, `\0`, `\\` and `\xHH`. Not empty.
pub fn separator(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        out.push(match bytes.next() {
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'0') => 0,
            Some(b'\\') => b'\\',
            Some(b'x') => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
                let (high, low) = (digit(bytes.next()), digit(bytes.next()));
                let value = high.zip(low).map(|(high, low)| high * 16 + low);
                value.and_then(|value| u8::try_from(value).ok()).ok_or("\\x is followed by two hex digits")?
            }
            _ => return Err("known escapes are \\n \\r \\t \\0 \\\\ and \\xHH".to_owned()),
        });
    }
    if out.is_empty() { Err("it must not be empty".to_owned()) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::option::cache_text;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration_ms("7d"), Ok(7 * 86_400_000));
        assert_eq!(duration_ms("500ms"), Ok(500));
        assert_eq!(duration_ms("0"), Ok(0));
        for wrong in ["", "7", "d", "-1s", "1.5h", "99999999999999999d"] {
            assert!(duration_ms(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_cache_policy_is_a_word_a_size_or_a_share() {
        assert_eq!(cache("shared"), Ok(CachePolicy::SHARED));
        assert_eq!(cache("none"), Ok(CachePolicy::NONE));
        assert_eq!(cache("10%"), Ok(CachePolicy::percent(10).unwrap()));
        assert_eq!(cache("64MiB"), Ok(CachePolicy::bytes(64 << 20).unwrap()));
        for wrong in ["", "0", "0%", "101%", "%", "-1%", "some", "1.5MiB", "9223372036854775808"] {
            assert!(cache(wrong).is_err(), "{wrong}");
        }
        for text in ["shared", "none", "1%", "100%", "64 MiB", "1000", "1573888"] {
            assert_eq!(cache_text(cache(text).unwrap()), text);
        }
    }

    #[test]
    fn places_are_named_or_numbered() {
        assert_eq!(place("earliest"), Ok(Place::Earliest));
        assert_eq!(place("offset:0"), Ok(Place::Offset(0)));
        assert_eq!(place("time:12"), Ok(Place::Time(12)));
        for wrong in ["", "first", "offset:", "offset:-1", "earliest:", "time:now"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_dates_or_so_long_ago_or_milliseconds() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let place = |text| place_at(text, now);
        let ten = Ok(Place::Time(1_795_255_200_000));
        assert_eq!(place("time:2026-11-21T10:00:00Z"), ten);
        assert_eq!(place("time:2026-11-21T12:00:00+02:00"), ten);
        assert_eq!(place("time:2026-11-21t10:00:00.000z"), ten);
        assert_eq!(place("time:1795255200000"), ten);
        assert_eq!(place("time:-2h"), ten);
        assert_eq!(place("time:-120m"), ten);
        assert_eq!(place("time:-0"), Ok(Place::Time(1_795_262_400_000)));
        assert_eq!(place("time:-99999d"), Ok(Place::Time(0)));
        assert_eq!(place("time:1969-01-01T00:00:00Z"), Ok(Place::Time(0)));
        for wrong in
            ["time:", "time:-", "time:-10", "time:10m", "time:2026-11-21", "time:2026-11-21T10:00:00", "time:-1y"]
        {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn separators_may_be_escaped() {
        assert_eq!(separator("\\n"), Ok(b"\n".to_vec()));
        assert_eq!(separator("a\\x00\\\\"), Ok(b"a\0\\".to_vec()));
        assert_eq!(separator("ü"), Ok("ü".as_bytes().to_vec()));
        for wrong in ["", "\\", "\\q", "\\x1", "\\xzz"] {
            assert!(separator(wrong).is_err(), "{wrong}");
        }
    }
}

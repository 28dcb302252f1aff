//! How an option is declared: once, with its type, default, unit, range and reason. The rest (flags, environment, file,
//! `--print-config`, the reference in `docs/`) is made from the declaration.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use drava_protocol::message::CachePolicy;

/// The declaration of one option.
#[derive(Clone, Debug)]
pub struct OptionSpec {
    /// Table of the file, or empty for the top level.
    pub section: &'static str,
    pub key: &'static str,
    /// One paragraph that says what it is and why one would change it.
    pub doc: String,
    pub unit: Unit,
    pub range: Range,
    /// As it would be written in the file; on this machine.
    pub default: String,
    /// Says what the default is where it depends on the machine.
    pub default_note: &'static str,
}

impl OptionSpec {
    /// `storage.segment_bytes`
    pub fn path(&self) -> String {
        if self.section.is_empty() { self.key.to_owned() } else { format!("{}.{}", self.section, self.key) }
    }

    /// `storage-segment-bytes`, without the dashes before it.
    pub fn flag(&self) -> String {
        self.path().replace(['.', '_'], "-")
    }

    /// `DRAVA_STORAGE_SEGMENT_BYTES`
    pub fn env(&self) -> String {
        format!("DRAVA_{}", self.path().replace('.', "_").to_uppercase())
    }

    /// Unit, range and default in one line.
    pub fn limits(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.unit.text().map(str::to_owned));
        parts.extend(self.range.text(self.unit));
        let default = if self.default_note.is_empty() {
            match self.default.parse::<u64>() {
                Ok(number) if self.unit == Unit::Bytes => format!("{number} ({})", bytes_text(number)),
                _ => self.default.clone(),
            }
        } else {
            self.default_note.to_owned()
        };
        parts.push(format!("default: {default}"));
        parts.join("; ")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    None,
    Bytes,
    Milliseconds,
    Seconds,
}

impl Unit {
    fn text(self) -> Option<&'static str> {
        match self {
            Unit::None => None,
            Unit::Bytes => Some("bytes"),
            Unit::Milliseconds => Some("milliseconds"),
            Unit::Seconds => Some("seconds"),
        }
    }
}

/// The values that an option may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Range {
    /// Whatever its type can hold.
    Any,
    Numbers(RangeInclusive<u64>),
    Names(&'static [&'static str]),
}

impl Range {
    fn text(&self, unit: Unit) -> Option<String> {
        match self {
            Range::Any => None,
            Range::Numbers(range) if unit == Unit::Bytes => {
                Some(format!("{} to {}", bytes_text(*range.start()), bytes_text(*range.end())))
            }
            Range::Numbers(range) => Some(format!("{} to {}", range.start(), range.end())),
            Range::Names(names) => Some(format!("one of {}", names.join(", "))),
        }
    }
}

/// A value as it came in, before it has its type.
#[derive(Clone, Copy, Debug)]
pub enum Raw<'a> {
    /// From a flag or from the environment.
    Text(&'a str),
    File(&'a toml::Value),
}

/// A type that an option may have.
pub trait OptionValue: Sized {
    /// Errors say what was expected, as the end of "… is not valid: ".
    fn read(raw: Raw<'_>, unit: Unit) -> Result<Self, String>;
    fn to_toml(&self) -> toml::Value;

    fn number(&self) -> Option<u64> {
        None
    }
}

/// Reads a value and holds it against its range.
pub fn read_checked<T: OptionValue>(raw: Raw<'_>, unit: Unit, range: &Range) -> Result<T, String> {
    let value = T::read(raw, unit)?;
    if let (Some(number), Range::Numbers(allowed)) = (value.number(), range)
        && !allowed.contains(&number)
    {
        let allowed = range.text(unit).unwrap_or_default();
        return Err(format!("{number} is out of range; allowed is {allowed}"));
    }
    Ok(value)
}

macro_rules! number_values {
    ($($type:ty)*) => {$(
        impl OptionValue for $type {
            fn read(raw: Raw<'_>, unit: Unit) -> Result<Self, String> {
                let number = read_number(raw, unit)?;
                <$type>::try_from(number).map_err(|_| format!("{number} is out of range; at most {} is allowed", <$type>::MAX))
            }

            fn to_toml(&self) -> toml::Value {
                toml::Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
            }

            fn number(&self) -> Option<u64> {
                u64::try_from(*self).ok()
            }
        }
    )*};
}

number_values!(u16 u32 u64 usize);

fn read_number(raw: Raw<'_>, unit: Unit) -> Result<u64, String> {
    let expected = match unit {
        Unit::Bytes => "expected a number of bytes, such as 1048576 or \"1 MiB\"",
        Unit::Milliseconds => "expected a whole number of milliseconds",
        Unit::Seconds => "expected a whole number of seconds",
        Unit::None => "expected a whole number that is not negative",
    };
    let number = match raw {
        Raw::File(toml::Value::Integer(number)) => u64::try_from(*number).ok(),
        Raw::File(toml::Value::String(text)) if unit == Unit::Bytes => parse_bytes(text),
        Raw::Text(text) if unit == Unit::Bytes => parse_bytes(text),
        Raw::Text(text) => text.trim().parse().ok(),
        Raw::File(_) => None,
    };
    number.ok_or_else(|| expected.to_owned())
}

/// Reads `1048576`, `1 MiB`, `1MiB`, `64k`. Units are binary.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Writes `64 MiB`, or `1.5 GiB` where it is not whole.
pub fn bytes_text(bytes: u64) -> String {
    const NAMES: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut step = 0;
    while step + 1 < NAMES.len() && 1u64 << (10 * (step + 1)) <= bytes {
        step += 1;
    }
    let unit = 1u64 << (10 * step);
    if bytes.is_multiple_of(unit) {
        format!("{} {}", bytes / unit, NAMES[step])
    } else {
        format!("{:.1} {}", bytes as f64 / unit as f64, NAMES[step])
    }
}

/// Reads `shared`, `none`, `10%`, or a size such as `64 MiB`.
pub fn parse_cache(text: &str) -> Option<CachePolicy> {
    match text.trim() {
        "shared" => Some(CachePolicy::SHARED),
        "none" => Some(CachePolicy::NONE),
        text => match text.strip_suffix('%') {
            Some(percent) => CachePolicy::percent(percent.trim_end().parse().ok()?),
            None => CachePolicy::bytes(parse_bytes(text)?),
        },
    }
}

/// Writes what [`parse_cache`] reads back as the same.
pub fn cache_text(policy: CachePolicy) -> String {
    match (policy.as_percent(), policy.as_bytes()) {
        (Some(0), _) => "none".to_owned(),
        (Some(percent), _) => format!("{percent}%"),
        (None, Some(bytes)) => {
            Some(bytes_text(bytes)).filter(|text| parse_bytes(text) == Some(bytes)).unwrap_or_else(|| bytes.to_string())
        }
        (None, None) => "shared".to_owned(),
    }
}

/// What to say of a text that is no cache policy.
pub const CACHE_EXPECTED: &str = "expected shared, none, a size such as 64MiB, or a share of the cache such as 10%";

impl OptionValue for bool {
    fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
        match raw {
            Raw::File(toml::Value::Boolean(value)) => Ok(*value),
            Raw::Text("true") => Ok(true),
            Raw::Text("false") => Ok(false),
            Raw::Text(_) | Raw::File(_) => Err("expected true or false".to_owned()),
        }
    }

    fn to_toml(&self) -> toml::Value {
        toml::Value::Boolean(*self)
    }
}

fn read_text<'a>(raw: Raw<'a>, expected: &str) -> Result<&'a str, String> {
    match raw {
        Raw::Text(text) => Ok(text),
        Raw::File(toml::Value::String(text)) => Ok(text),
        Raw::File(_) => Err(expected.to_owned()),
    }
}

impl OptionValue for String {
    fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
        read_text(raw, "expected text in quotes").map(str::to_owned)
    }

    fn to_toml(&self) -> toml::Value {
        toml::Value::String(self.clone())
    }
}

impl OptionValue for PathBuf {
    fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
        match read_text(raw, "expected a path in quotes")? {
            "" => Err("expected a path that is not empty".to_owned()),
            path => Ok(PathBuf::from(path)),
        }
    }

    fn to_toml(&self) -> toml::Value {
        toml::Value::String(self.display().to_string())
    }
}

impl OptionValue for SocketAddr {
    fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
        const EXPECTED: &str = "expected an IP address and a port, such as \"127.0.0.1:7400\" or \"[::1]:7400\"";
        read_text(raw, EXPECTED)?.parse().map_err(|_| EXPECTED.to_owned())
    }

    fn to_toml(&self) -> toml::Value {
        toml::Value::String(self.to_string())
    }
}

/// Which cores the shards are pinned to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cores {
    /// One shard after the other on the cores that the process may use, from the first again when they are used up.
    #[default]
    Auto,
    /// The system moves the shards as it likes. For tests.
    None,
    /// Shard 0 on the first, shard 1 on the second, and so on, from the first again. One more than there are shards: the
    /// last is the control core's.
    Pins(Vec<usize>),
}

impl OptionValue for Cores {
    fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
        const EXPECTED: &str = "expected \"auto\", \"none\" or a list of core numbers, such as [0, 1] (a flag: 0,1)";
        let expected = || EXPECTED.to_owned();
        let text = match raw {
            Raw::File(toml::Value::Array(list)) => {
                let core = |value: &toml::Value| value.as_integer().and_then(|core| usize::try_from(core).ok());
                let pins: Vec<usize> = list.iter().map(core).collect::<Option<_>>().ok_or_else(expected)?;
                return if pins.is_empty() { Err(expected()) } else { Ok(Cores::Pins(pins)) };
            }
            raw => read_text(raw, EXPECTED)?,
        };
        match text {
            "auto" => Ok(Cores::Auto),
            "none" => Ok(Cores::None),
            list => {
                let pins: Result<Vec<usize>, _> = list.split(',').map(|core| core.trim().parse()).collect();
                pins.map(Cores::Pins).map_err(|_| expected())
            }
        }
    }

    fn to_toml(&self) -> toml::Value {
        match self {
            Cores::Auto => toml::Value::String("auto".to_owned()),
            Cores::None => toml::Value::String("none".to_owned()),
            Cores::Pins(pins) => {
                toml::Value::Array(pins.iter().map(|core| toml::Value::Integer(*core as i64)).collect())
            }
        }
    }
}

/// Declares an enum whose values are names in the configuration.
macro_rules! names {
    ($(#[$meta:meta])* $type:ident { $($(#[$variant_meta:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type { $($(#[$variant_meta])* $variant,)* }

        impl $type {
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            pub fn name(self) -> &'static str {
                match self { $($type::$variant => $name,)* }
            }
        }

        impl OptionValue for $type {
            fn read(raw: Raw<'_>, _: Unit) -> Result<Self, String> {
                let expected = || format!("expected one of {}", Self::NAMES.join(", "));
                match read_text(raw, "").map_err(|_| expected())? {
                    $($name => Ok($type::$variant),)*
                    _ => Err(expected()),
                }
            }

            fn to_toml(&self) -> toml::Value {
                toml::Value::String(self.name().to_owned())
            }
        }
    };
}

names! {
    /// The least important events that are logged.
    LogLevel {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

names! {
    /// How an event is written.
    LogFormat {
        /// One line for people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

/// A struct whose fields are options.
pub trait Section {
    /// The declarations, in the order in which they were written.
    fn specs() -> Vec<OptionSpec>;
    /// `None`: there is no such key here.
    fn set(&mut self, key: &str, raw: Raw<'_>) -> Option<Result<(), String>>;
    fn get(&self, key: &str) -> Option<toml::Value>;
}

/// Declares the options of one table of the file: a struct with its defaults and its [`Section`].
macro_rules! section {
    (
        $(#[$meta:meta])*
        $name:ident, $section:literal {
            $(
                $(#[doc = $doc:literal])+
                $field:ident: $type:ty = $default:expr, $unit:ident, $range:expr $(, $note:literal)?;
            )*
        }
        $(with { $($nested:ident: $nested_type:ty,)* })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
            $($(pub $nested: $nested_type,)*)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($field: $default,)*
                    $($($nested: Default::default(),)*)?
                }
            }
        }

        impl $crate::config::option::Section for $name {
            fn specs() -> Vec<$crate::config::option::OptionSpec> {
                use $crate::config::option::{OptionSpec, OptionValue, Range, Unit};
                let default = Self::default();
                vec![$(OptionSpec {
                    section: $section,
                    key: stringify!($field),
                    doc: [$($doc),+].map(str::trim).join(" "),
                    unit: Unit::$unit,
                    range: { let range: Range = $range; range },
                    default: default.$field.to_toml().to_string(),
                    default_note: concat!("" $(, $note)?),
                },)*]
            }

            fn set(&mut self, key: &str, raw: $crate::config::option::Raw<'_>) -> Option<Result<(), String>> {
                use $crate::config::option::{Range, Unit, read_checked};
                match key {
                    $(stringify!($field) => {
                        let range: Range = $range;
                        Some(read_checked::<$type>(raw, Unit::$unit, &range).map(|value| self.$field = value))
                    })*
                    _ => None,
                }
            }

            fn get(&self, key: &str) -> Option<toml::Value> {
                use $crate::config::option::OptionValue;
                match key {
                    $(stringify!($field) => Some(self.$field.to_toml()),)*
                    _ => None,
                }
            }
        }
    };
}

pub(super) use section;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        assert_eq!(parse_bytes("4096"), Some(4096));
        assert_eq!(parse_bytes("64 MiB"), Some(64 << 20));
        assert_eq!(parse_bytes("1g"), Some(1 << 30));
        assert_eq!(parse_bytes("1 MB"), None);
        assert_eq!(parse_bytes("-1"), None);
        assert_eq!(parse_bytes("99999999999 TiB"), None);
    }

    #[test]
    fn sizes_are_written_so_that_people_read_them() {
        assert_eq!(bytes_text(512), "512 bytes");
        assert_eq!(bytes_text(64 << 20), "64 MiB");
        assert_eq!(bytes_text((1 << 30) + (1 << 29)), "1.5 GiB");
    }
}

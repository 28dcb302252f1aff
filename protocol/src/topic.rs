//! Topic names: `/tenant/namespace…/name`.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

pub const NAME_BYTES_MAX: usize = 255;
pub const SEGMENT_BYTES_MAX: usize = 64;
const DEFAULT_PARENT: &str = "/public/default/";

/// A full topic name in its canonical form: a tenant, at least one namespace, a name. Cheap to clone: metadata images
/// hold each name several times.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicName(Arc<str>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicNameError {
    #[error("a topic name is not empty")]
    Empty,
    #[error("the topic name has {0} bytes; at most {NAME_BYTES_MAX} are allowed")]
    TooLong(usize),
    #[error("a full topic name has a tenant, a namespace and a name: /tenant/namespace/name; `{0}` does not")]
    TooFewParts(String),
    #[error(
        "part {part:?} of the topic name is empty, over {SEGMENT_BYTES_MAX} bytes, or has other characters than a-z A-Z 0-9 . _ -"
    )]
    Part { part: String },
}

impl TopicName {
    /// Reads a name as users write it: a bare `orders` means `/public/default/orders`.
    pub fn parse(text: &str) -> Result<TopicName, TopicNameError> {
        if text.is_empty() {
            return Err(TopicNameError::Empty);
        }
        let full = if text.starts_with('/') { text.to_owned() } else { format!("{DEFAULT_PARENT}{text}") };
        if full.len() > NAME_BYTES_MAX {
            return Err(TopicNameError::TooLong(full.len()));
        }
        let parts: Vec<&str> = full[1..].split('/').collect();
        for part in &parts {
            let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
            if part.is_empty()
                || part.len() > SEGMENT_BYTES_MAX
                || !part.bytes().all(allowed)
                || *part == "."
                || *part == ".."
            {
                return Err(TopicNameError::Part { part: (*part).to_owned() });
            }
        }
        if parts.len() < 3 {
            return Err(TopicNameError::TooFewParts(full));
        }
        Ok(TopicName(full.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn tenant(&self) -> &str {
        self.0[1..].split('/').next().unwrap_or_default()
    }

    /// The name as people write it: without `/public/default/` where that is its parent.
    pub fn short(&self) -> &str {
        self.0.strip_prefix(DEFAULT_PARENT).unwrap_or(&self.0)
    }
}

/// So that a map by name is searched with what users typed: ordering and hash are those of the text.
impl Borrow<str> for TopicName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bare_name_lives_in_the_default_namespace() {
        let name = TopicName::parse("orders").unwrap();
        assert_eq!((name.as_str(), name.short(), name.tenant()), ("/public/default/orders", "orders", "public"));
        let full = TopicName::parse("/acme/shop/eu/orders").unwrap();
        assert_eq!((full.short(), full.tenant()), ("/acme/shop/eu/orders", "acme"));
    }

    #[test]
    fn names_that_are_none_are_refused() {
        assert_eq!(TopicName::parse(""), Err(TopicNameError::Empty));
        assert_eq!(TopicName::parse("/a/b"), Err(TopicNameError::TooFewParts("/a/b".into())));
        let long = format!("/{}", "a/".repeat(NAME_BYTES_MAX));
        assert_eq!(TopicName::parse(&long), Err(TopicNameError::TooLong(long.len())));
        for bad in ["/", "//", "/a/b/", "/a//b", "a b", "..", "/a/../b", "é", "a\n", &"s".repeat(SEGMENT_BYTES_MAX + 1)]
        {
            assert!(matches!(TopicName::parse(bad), Err(TopicNameError::Part { .. })), "{bad:?}");
        }
    }

    #[test]
    fn an_error_shows_control_characters_as_such() {
        let error = TopicName::parse("a\n\x1b[2J").unwrap_err().to_string();
        assert!(!error.contains(char::is_control), "{error:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_canonical(text in prop_oneof![".{0,300}", "/?([a-z._-]{0,4}/){0,5}[a-z.]{0,4}"]) {
            if let Ok(name) = TopicName::parse(&text) {
                prop_assert!(name.as_str().len() <= NAME_BYTES_MAX);
                prop_assert!(3 <= name.as_str().split('/').skip(1).count());
                prop_assert!(name.as_str().starts_with('/') && !name.as_str().contains("//"));
                prop_assert!(!name.tenant().is_empty());
                prop_assert_eq!(&TopicName::parse(name.as_str()), &Ok(name.clone()));
                prop_assert_eq!(&TopicName::parse(name.short()), &Ok(name.clone()));
            }
        }
    }
}

//! A topic name as users write it.
#![no_main]

use drava_protocol::topic::{NAME_BYTES_MAX, TopicName};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| match TopicName::parse(text) {
    Ok(name) => {
        assert!(name.as_str().len() <= NAME_BYTES_MAX);
        assert!(!name.tenant().is_empty());
        assert_eq!(TopicName::parse(name.as_str()).as_ref(), Ok(&name));
        assert_eq!(TopicName::parse(name.short()).as_ref(), Ok(&name));
    }
    Err(error) => assert!(!error.to_string().contains(char::is_control)),
});

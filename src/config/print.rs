//! Writes a configuration as the file that would make it, and the reference in `docs/configuration.md`.

use super::NodeConfig;
use super::option::OptionSpec;

const WIDTH: usize = 100;

/// The file that makes `config`, each option with its declaration as a comment.
pub fn print(config: &NodeConfig) -> String {
    let mut out = String::new();
    let mut section = "";
    for spec in NodeConfig::all_specs() {
        if !out.is_empty() {
            out.push('\n');
        }
        if spec.section != section {
            section = spec.section;
            out.push_str(&format!("[{section}]\n\n"));
        }
        for line in wrap(&spec.doc).chain(wrap(&spec.limits())) {
            out.push_str(&format!("# {line}\n"));
        }
        let value = config.get_path(spec.section, spec.key).expect("what is declared can be read");
        out.push_str(&format!("{} = {value}\n", spec.key));
    }
    out
}

fn wrap(text: &str) -> impl Iterator<Item = String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is a first line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= WIDTH {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.into_iter()
}

/// The reference of all options in Markdown: the same on every machine.
pub fn reference() -> String {
    let mut out = String::new();
    let mut section = None;
    for spec in NodeConfig::all_specs() {
        if section != Some(spec.section) {
            section = Some(spec.section);
            let title = if spec.section.is_empty() { "Top level".to_owned() } else { format!("`[{}]`", spec.section) };
            out.push_str(&format!("\n## {title}\n"));
        }
        out.push_str(&entry(&spec));
    }
    out
}

fn entry(spec: &OptionSpec) -> String {
    format!(
        "\n### `{}`\n\n{}\n\n{}. Flag `--{}`, environment `{}`.\n",
        spec.path(),
        spec.doc,
        capitalised(&spec.limits()),
        spec.flag(),
        spec.env()
    )
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::{Sources, load};
    use crate::config::{Cores, LogFormat};

    fn reread(config: &NodeConfig) -> NodeConfig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drava.toml");
        std::fs::write(&path, print(config)).unwrap();
        load(&Sources { file: Some(path), ..Sources::default() }).unwrap().config
    }

    #[test]
    fn what_is_printed_is_read_back_as_the_same() {
        let mut config = NodeConfig::default();
        assert_eq!(reread(&config), config);
        config.cores = Cores::Pins(vec![0, 1, 2]);
        config.advertised_host = "drava.example \"quoted\"".to_owned();
        config.storage.verify_reads = false;
        config.log.format = LogFormat::Json;
        config.storage.disk_reserve_bytes = 0;
        assert_eq!(reread(&config), config);
    }

    #[test]
    fn every_default_lies_in_its_own_range() {
        for spec in NodeConfig::all_specs() {
            let table: toml::Table = format!("value = {}", spec.default).parse().unwrap();
            let mut config = NodeConfig::default();
            let raw = crate::config::option::Raw::File(&table["value"]);
            assert_eq!(config.set_path(spec.section, spec.key, raw), Some(Ok(())), "{}", spec.path());
        }
    }

    #[test]
    fn every_option_has_a_doc_line_and_its_name_says_its_unit() {
        use crate::config::option::Unit;
        for spec in NodeConfig::all_specs() {
            assert!(spec.doc.ends_with('.'), "{}: {}", spec.path(), spec.doc);
            match spec.unit {
                Unit::Bytes => assert!(spec.key.contains("_bytes"), "{}", spec.path()),
                Unit::Milliseconds => assert!(spec.key.ends_with("_ms"), "{}", spec.path()),
                Unit::Seconds => assert!(spec.key.ends_with("_s"), "{}", spec.path()),
                Unit::None => {}
            }
        }
    }
}

//! Reads a configuration from its sources and says everything that is wrong with it at once.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::NodeConfig;
use super::option::{OptionSpec, Raw};

/// Where the values come from. A later one beats an earlier one.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file, if one was named.
    pub file: Option<PathBuf>,
    /// The environment: all of it, other variables are passed over.
    pub env: Vec<(String, String)>,
    /// By path: `storage.segment_bytes`.
    pub flags: Vec<(String, String)>,
}

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: NodeConfig,
    /// Variables that look like options of ours and are none, with the nearest that is one.
    pub suspects: Vec<(String, String)>,
}

/// Where a wrong value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    File { file: PathBuf, path: String },
    Env { variable: String },
    Flag { flag: String },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { file, path } => write!(f, "{}: {path}", file.display()),
            Origin::Env { variable } => write!(f, "environment: {variable}"),
            Origin::Flag { flag } => write!(f, "--{flag}"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: cannot be read: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("{}: is no TOML: {reason}", file.display())]
    Syntax { file: PathBuf, reason: String },
    #[error("{origin} is no option{}", nearest.as_ref().map(|key| format!("; did you mean {key}?")).unwrap_or_default())]
    UnknownKey { origin: Origin, nearest: Option<String> },
    #[error("{origin} is not valid: {reason}")]
    Value { origin: Origin, reason: String },
    #[error("the options do not fit together: {reason}")]
    Rule { reason: String },
}

/// Everything that is wrong. Never empty.
#[derive(Debug)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Reads, checks and merges all sources.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigErrors> {
    let specs = NodeConfig::all_specs();
    let mut config = NodeConfig::default();
    let mut errors = Vec::new();
    if let Some(file) = &sources.file {
        apply_file(&mut config, &specs, file, &mut errors);
    }
    let mut suspects = Vec::new();
    for (variable, value) in &sources.env {
        match specs.iter().find(|spec| spec.env() == *variable) {
            Some(spec) => {
                if let Some(Err(reason)) = config.set_path(spec.section, spec.key, Raw::Text(value)) {
                    errors.push(ConfigError::Value { origin: Origin::Env { variable: variable.clone() }, reason });
                }
            }
            // Not refused: orchestrators put variables of their own into this name space.
            None if variable.starts_with("DRAVA_") => {
                let near = nearest(variable, specs.iter().map(OptionSpec::env), 0.9);
                suspects.extend(near.map(|near| (variable.clone(), near)));
            }
            None => {}
        }
    }
    for (path, value) in &sources.flags {
        let (section, key) = path.split_once('.').unwrap_or(("", path));
        let origin = || Origin::Flag { flag: path.replace(['.', '_'], "-") };
        match config.set_path(section, key, Raw::Text(value)) {
            Some(Ok(())) => {}
            Some(Err(reason)) => errors.push(ConfigError::Value { origin: origin(), reason }),
            None => errors.push(ConfigError::UnknownKey { origin: origin(), nearest: None }),
        }
    }
    // Rules between values say nothing useful while a value itself is wrong.
    if errors.is_empty() {
        errors.extend(config.broken_rules().into_iter().map(|reason| ConfigError::Rule { reason }));
    }
    if errors.is_empty() { Ok(Loaded { config, suspects }) } else { Err(ConfigErrors(errors)) }
}

fn apply_file(config: &mut NodeConfig, specs: &[OptionSpec], file: &Path, errors: &mut Vec<ConfigError>) {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(source) => return errors.push(ConfigError::Read { file: file.to_owned(), source }),
    };
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            let reason = toml::de::Error::to_string(&error).trim_end().to_owned();
            return errors.push(ConfigError::Syntax { file: file.to_owned(), reason });
        }
    };
    let origin = |path: &str| Origin::File { file: file.to_owned(), path: path.to_owned() };
    let mut set = |section: &str, key: &str, value: &toml::Value| {
        let path = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        match config.set_path(section, key, Raw::File(value)) {
            Some(Ok(())) => {}
            Some(Err(reason)) => errors.push(ConfigError::Value { origin: origin(&path), reason }),
            None => {
                let nearest = nearest_path(specs, section, key);
                errors.push(ConfigError::UnknownKey { origin: origin(&path), nearest });
            }
        }
    };
    let is_section = |key: &str| specs.iter().any(|spec| spec.section == key);
    let mut not_sections = Vec::new();
    for (key, value) in &table {
        match value {
            toml::Value::Table(inner) => inner.iter().for_each(|(inner_key, value)| set(key, inner_key, value)),
            _ if is_section(key) => not_sections.push(key),
            value => set("", key, value),
        }
    }
    for key in not_sections {
        let reason = format!("it is a table; write [{key}] and its options below");
        errors.push(ConfigError::Value { origin: origin(key), reason });
    }
}

/// The option that was probably meant: the same key in another table, or else the one spelled most like it.
fn nearest_path(specs: &[OptionSpec], section: &str, key: &str) -> Option<String> {
    let path = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let same_key = specs.iter().find(|spec| spec.key == key).map(OptionSpec::path);
    let in_section: Vec<_> = specs.iter().filter(|spec| spec.section == section).collect();
    same_key
        .or_else(|| {
            nearest(key, in_section.iter().map(|spec| spec.key.to_owned()), 0.8)
                .map(|near| if section.is_empty() { near } else { format!("{section}.{near}") })
        })
        .or_else(|| nearest(&path, specs.iter().map(OptionSpec::path), 0.75))
        .or_else(|| {
            // `[store] segment_byte`: neither the table nor the key is right.
            let key = nearest(key, specs.iter().map(|spec| spec.key.to_owned()), 0.8)?;
            specs.iter().find(|spec| spec.key == key).map(OptionSpec::path)
        })
}

fn nearest(word: &str, candidates: impl Iterator<Item = String>, similarity_min: f64) -> Option<String> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, &candidate), candidate))
        .filter(|(similarity, _)| similarity_min <= *similarity)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cores, LogLevel};

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drava.toml");
        std::fs::write(&path, text).unwrap();
        (folder, Sources { file: Some(path), ..Sources::default() })
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    fn errors(text: &str) -> Vec<String> {
        let (_folder, sources) = file(text);
        let prefix = format!("{}: ", sources.file.as_ref().unwrap().display());
        let ConfigErrors(errors) = load(&sources).unwrap_err();
        errors.iter().map(|error| error.to_string().replace(&prefix, "")).collect()
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
        let (_folder, mut sources) = file("node_id = 2\nshards = 3\ndrain_timeout_ms = 5\n");
        sources.env = pairs(&[("DRAVA_NODE_ID", "20"), ("DRAVA_SHARDS", "4"), ("PATH", "/bin")]);
        sources.flags = pairs(&[("node_id", "200")]);
        let config = load(&sources).unwrap().config;
        assert_eq!((config.node_id, config.shards, config.drain_timeout_ms), (200, 4, 5));
        assert_eq!(config.network.in_flight_max, NodeConfig::default().network.in_flight_max);
    }

    #[test]
    fn values_of_every_kind_are_read_from_file_and_text() {
        let (_folder, mut sources) = file(
            "cores = [1, 0]\nlisten = \"[::1]:9000\"\n[storage]\nsegment_bytes = \"32 MiB\"\nverify_reads = false\n",
        );
        sources.env = pairs(&[("DRAVA_LOG_LEVEL", "debug"), ("DRAVA_STORAGE_CACHE_BYTES", "16MiB")]);
        let config = load(&sources).unwrap().config;
        assert_eq!(config.cores, Cores::Pins(vec![1, 0]));
        assert_eq!(config.listen.port(), 9000);
        assert_eq!(config.storage.segment_bytes, 32 << 20);
        assert_eq!(config.storage.cache_bytes, 16 << 20);
        assert_eq!(config.log.level, LogLevel::Debug);
        assert!(!config.storage.verify_reads);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_valid_one() {
        let cases = [
            ("[storage]\nsegmet_bytes = 1\n", "storage.segmet_bytes is no option; did you mean storage.segment_bytes?"),
            ("nodeid = 1\n", "nodeid is no option; did you mean node_id?"),
            ("segment_bytes = 1\n", "segment_bytes is no option; did you mean storage.segment_bytes?"),
            ("[store]\ncache_byte = 1\n", "store.cache_byte is no option; did you mean storage.cache_bytes?"),
            ("zzz = 1\n", "zzz is no option"),
        ];
        for (text, expected) in cases {
            assert_eq!(errors(text), [expected], "{text}");
        }
    }

    #[test]
    fn all_errors_are_told_at_once() {
        let found = errors("shards = 65\nlisten = \"localhost\"\nfoo = 1\n[log]\nlevel = \"loud\"\n");
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.iter().any(|error| error == "shards is not valid: 65 is out of range; allowed is 1 to 64"));
        assert!(found.iter().any(|error| error.starts_with("listen is not valid: expected an IP address and a port")));
        assert!(
            found
                .iter()
                .any(|error| { error == "log.level is not valid: expected one of error, warn, info, debug, trace" })
        );
    }

    #[test]
    fn wrong_types_and_ranges_are_refused() {
        for text in [
            "shards = 0",
            "shards = -1",
            "shards = \"2\"",
            "node_id = 0",
            "cores = []",
            "cores = [-1]",
            "storage = 1",
            "[storage]\nsegment_bytes = \"1 MB\"",
            "[storage]\nverify_reads = 1",
            "[network]\npayload_bytes_max = 99999999999",
            "[storage.deeper]\nkey = 1",
            "shards = ",
        ] {
            assert_eq!(errors(text).len(), 1, "{text}");
        }
    }

    #[test]
    fn rules_between_options_are_checked() {
        assert_eq!(errors("[storage]\nsegment_bytes = 16777217").len(), 1);
        assert_eq!(errors("[network]\npayload_bytes_max = \"48 MiB\"").len(), 1);
        assert_eq!(errors("listen = \"127.0.0.1:65535\"\nshards = 2").len(), 2);
        assert_eq!(errors("admin_listen = \"127.0.0.1:7401\"\nshards = 2").len(), 1);
        assert_eq!(errors("shard_port_base = 7400").len(), 1);
    }

    #[test]
    fn a_missing_file_is_named() {
        let sources = Sources { file: Some("/no/such/drava.toml".into()), ..Sources::default() };
        assert!(load(&sources).unwrap_err().to_string().contains("/no/such/drava.toml"));
    }

    #[test]
    fn a_variable_that_almost_is_an_option_is_a_suspect_and_others_pass() {
        let env =
            pairs(&[("DRAVA_STORAGE_SEGMENT_BYTE", "1"), ("DRAVA_PORT_7400_TCP_ADDR", "x"), ("DRAVA_SERVER", "y")]);
        let loaded = load(&Sources { env, ..Sources::default() }).unwrap();
        assert_eq!(loaded.suspects, pairs(&[("DRAVA_STORAGE_SEGMENT_BYTE", "DRAVA_STORAGE_SEGMENT_BYTES")]));
    }

    #[test]
    fn ports_and_cores_follow_from_the_options() {
        let mut config = NodeConfig { shards: 2, cores: Cores::Pins(vec![3, 5]), ..NodeConfig::default() };
        assert_eq!((config.shard_port(0), config.shard_port(1)), (7401, 7402));
        assert_eq!((config.shard_core(0), config.shard_core(1), config.shard_core(2)), (Some(3), Some(5), Some(3)));
        assert_eq!(config.control_core(), Some(3));
        config.cores = Cores::Pins(vec![3, 5, 7]);
        assert_eq!(config.control_core(), Some(7));
        config.cores = Cores::None;
        assert_eq!((config.shard_core(1), config.control_core()), (None, None));
        config.listen.set_port(0);
        assert_eq!(config.shard_port(1), 0);
        config.listen.set_port(9000);
        config.shard_port_base = 9100;
        assert_eq!(config.shard_port(1), 9101);
    }
}

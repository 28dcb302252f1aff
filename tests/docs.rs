//! The documents say what the code says. `DRAVA_WRITE_DOCS=1 cargo test --release --test docs` writes them anew.

use std::fs;
use std::path::{Path, PathBuf};

use drava::cli::Exit;
use drava::config::{NodeConfig, print};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compares `found` with `expected`, or writes it.
fn hold(path: &Path, found: &str, expected: &str) {
    if std::env::var_os("DRAVA_WRITE_DOCS").is_some() {
        fs::write(path, expected).unwrap();
        return;
    }
    assert!(
        found == expected,
        "{} is out of date: DRAVA_WRITE_DOCS=1 cargo test --release --test docs",
        path.display()
    );
}

#[test]
fn the_configuration_reference_is_that_of_the_declarations() {
    let path = root().join("docs/configuration.md");
    let text = read(&path);
    let introduction = text.split("\n## ").next().unwrap();
    let expected = format!("{}\n{}", introduction.trim_end_matches('\n'), print::reference());
    hold(&path, &text, &expected);
    for spec in NodeConfig::all_specs() {
        assert!(expected.contains(&format!("### `{}`", spec.path())), "{}", spec.path());
    }
}

#[test]
fn the_exit_codes_are_all_documented() {
    let path = root().join("docs/operating.md");
    let text = read(&path);
    let head = "| code | meaning |\n|---|---|\n";
    let (before, after) = text.split_once(head).expect("the table of exit codes");
    let rest = after.split_once("\n\n").expect("something after the table").1;
    let rows: Vec<String> =
        Exit::ALL.iter().map(|exit| format!("| {} | {} |", exit.number(), exit.meaning())).collect();
    hold(&path, &text, &format!("{before}{head}{}\n\n{rest}", rows.join("\n")));
}

#[test]
fn what_the_documents_link_to_exists() {
    let mut documents = vec![root().join("README.md"), root().join("ARCHITECTURE.md")];
    documents.extend(fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut links = 0;
    for document in documents {
        let text = read(&document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") || link.starts_with('#') {
                continue;
            }
            links += 1;
            let target = document.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(target.exists(), "{}: {link}", document.display());
        }
    }
    assert!(10 <= links, "the documents link to each other");
}

#[test]
fn metrics_that_the_guide_names_exist() {
    let source = read(&root().join("src/control/http/metrics.rs"));
    let guide = read(&root().join("docs/operating.md"));
    let mut named = 0;
    for name in guide.split('`').filter(|word| word.starts_with("drava_")) {
        let base = name.trim_end_matches("_total").trim_end_matches("_bytes").trim_end_matches("_seconds");
        assert!(source.contains(&format!("\"{base}\"")), "{name}");
        named += 1;
    }
    assert!(5 <= named, "{named}");
}

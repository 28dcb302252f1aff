//! A real file through the command line: lines in, lines out.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::node::Ports;

const TOPIC: &str = "real-file";

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("make, read or compare the file")]
    Io(#[from] io::Error),
    #[error("`drava {command}` failed: {text}")]
    Command { command: &'static str, text: String },
}

/// What came back of a file.
#[derive(Clone, Debug)]
pub struct Seen {
    pub bytes: u64,
    pub lines: u64,
    /// Changed, missing, added or out of order.
    pub lines_that_differ: u64,
    pub sha256: String,
    pub produce: Duration,
    pub consume: Duration,
}

impl Seen {
    pub fn show(&self) -> String {
        let mib = self.bytes as f64 / 1048576.0;
        format!(
            "{} lines, {mib:.0} MiB; produced in {:.2} s, consumed in {:.2} s; SHA-256 {}",
            self.lines,
            self.produce.as_secs_f64(),
            self.consume.as_secs_f64(),
            self.sha256
        )
    }
}

/// Writes a file of lines, publishes it with the command line, consumes it, and compares the two.
pub fn there_and_back(bin: &Path, ports: &Ports, dir: &Path, bytes: u64) -> Result<Seen, FileError> {
    let (sent, received) = (dir.join("lines-sent"), dir.join("lines-received"));
    let lines = write_lines(&sent, bytes)?;
    let addr = ports.listen.to_string();
    let began = Instant::now();
    drava(bin, "produce", &[TOPIC, "--server", &addr, "--create", "--quiet", "--file", &sent.to_string_lossy()], None)?;
    let produce = began.elapsed();
    let began = Instant::now();
    // Without a count: a line too many would be seen.
    drava(bin, "consume", &[TOPIC, "--server", &addr, "--from", "earliest"], Some(&received))?;
    let consume = began.elapsed();
    let lines_that_differ = differences(&sent, &received)?;
    let (sha_sent, sha_received) = (sha256(&sent)?, sha256(&received)?);
    let sha256 =
        if sha_sent == sha_received { format!("{sha_sent}, same") } else { format!("{sha_sent} != {sha_received}") };
    let bytes = fs::metadata(&sent)?.len();
    fs::remove_file(&sent)?;
    fs::remove_file(&received)?;
    Ok(Seen { bytes, lines, lines_that_differ, sha256, produce, consume })
}

/// Lines of many lengths, each with its number.
fn write_lines(path: &Path, bytes: u64) -> io::Result<u64> {
    const WORDS: [&str; 8] = ["order", "paid", "shipped", "Zürich", "東京", "returned", "refund", "{\"qty\": 3}"];
    let mut out = BufWriter::new(File::create(path)?);
    let (mut written, mut number) = (0, 0u64);
    while written < bytes {
        let mut line = format!("{number}");
        let mut bits = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for _ in 0..1 + bits % 24 {
            line.push(' ');
            line.push_str(WORDS[(bits >> 61) as usize]);
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(number);
        }
        line.push('\n');
        out.write_all(line.as_bytes())?;
        written += line.len() as u64;
        number += 1;
    }
    out.flush()?;
    Ok(number)
}

fn drava(bin: &Path, command: &'static str, arguments: &[&str], output: Option<&Path>) -> Result<(), FileError> {
    let stdout = match output {
        Some(path) => Stdio::from(File::create(path)?),
        None => Stdio::null(),
    };
    let ended = Command::new(bin)
        .arg(command)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()?;
    let ended = ended.wait_with_output()?;
    if !ended.status.success() {
        return Err(FileError::Command { command, text: String::from_utf8_lossy(&ended.stderr).trim().to_owned() });
    }
    Ok(())
}

fn differences(sent: &PathBuf, received: &PathBuf) -> io::Result<u64> {
    let mut sent = BufReader::new(File::open(sent)?);
    let mut received = BufReader::new(File::open(received)?);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut differences = 0;
    loop {
        left.clear();
        right.clear();
        sent.read_until(b'\n', &mut left)?;
        received.read_until(b'\n', &mut right)?;
        if left.is_empty() && right.is_empty() {
            return Ok(differences);
        }
        differences += u64::from(left != right);
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_ascii_whitespace().next().map(str::to_owned).ok_or_else(|| io::Error::other("sha256sum said nothing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_missing_or_added_line_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (left, right) = (dir.path().join("left"), dir.path().join("right"));
        let lines = write_lines(&left, 10_000).unwrap();
        assert!(20 < lines);
        let text = fs::read_to_string(&left).unwrap();
        let check = |changed: &str| {
            fs::write(&right, changed).unwrap();
            differences(&left, &right).unwrap()
        };
        assert_eq!(check(&text), 0);
        assert_eq!(check(&format!("{text}more\n")), 1);
        assert_eq!(check(text.trim_end()), 1);
        assert_eq!(check(&text.replacen("\n5 ", "\n6 ", 1)), 1);
        assert!(0 < check(text.split_once('\n').unwrap().1));
    }
}

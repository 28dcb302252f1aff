//! File systems on files: small ones that can be full, and ones whose power can be cut.
//!
//! Needs root and loop devices. Where there are none, [`Disk::make`] says why, and the test is skipped with the reason.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// An ext4 file system on a file, mounted. Unmounted with this value; the file stays.
pub struct Disk {
    pub image: PathBuf,
    pub mount: PathBuf,
}

impl Disk {
    /// Makes a file system of `bytes` in `image` and mounts it at `mount`. The error is a reason to skip a test.
    pub fn make(image: &Path, mount: &Path, bytes: u64) -> Result<Disk, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can mount file systems".to_owned());
        }
        std::fs::File::create(image).and_then(|file| file.set_len(bytes)).map_err(|error| error.to_string())?;
        // Nothing is reserved for root, as whom the node runs here, and nothing is written later by the kernel.
        run("mkfs.ext4", &["-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"], &[image])?;
        Disk::mount(image, mount)
    }

    /// Mounts what is in `image`, with what its journal holds, as after a power cut.
    pub fn mount(image: &Path, mount: &Path) -> Result<Disk, String> {
        std::fs::create_dir_all(mount).map_err(|error| error.to_string())?;
        run("mount", &["-o", "loop"], &[image, mount])?;
        Ok(Disk { image: image.to_owned(), mount: mount.to_owned() })
    }

    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.mount).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Copies a file that lies on this file system at one moment: while it is copied, nothing is written here. Whoever
    /// writes waits.
    pub fn copy_at_once(&self, from: &Path, to: &Path) {
        let frozen = Frozen::new(self);
        run("cp", &["--sparse=always"], &[from, to]).unwrap();
        drop(frozen);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Somebody may just be looking: a process that was killed, an indexer of the host.
        for _ in 0..50 {
            if run("umount", &[], &[&self.mount]).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        // Never hide the failure that a test ends with.
        if let Err(error) = run("umount", &["--lazy"], &[&self.mount]) {
            eprintln!("{} stays mounted: {error}", self.mount.display());
        }
    }
}

/// A file system that takes no writes until this value goes.
struct Frozen<'a>(&'a Disk);

impl Frozen<'_> {
    fn new(disk: &Disk) -> Frozen<'_> {
        run("fsfreeze", &["--freeze"], &[&disk.mount]).unwrap();
        Frozen(disk)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Err(error) = run("fsfreeze", &["--unfreeze"], &[&self.0.mount]) {
            eprintln!("{} stays frozen: {error}", self.0.mount.display());
        }
    }
}

/// Tells that a test was not run. `scripts/soak` looks for the first word.
pub fn skipped(reason: &str) {
    println!("SKIPPED: {reason}");
}

fn run(program: &str, arguments: &[&str], paths: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).args(paths).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

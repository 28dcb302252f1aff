//! Threads whose work can wait.

/// Nanoseconds, the least there is.
const TURN_NS: u64 = 100_000;

/// Lets the calling thread, and threads that it starts, run in short turns: a thread that becomes ready waits for the end of
/// the turn of the one that runs, which is some milliseconds otherwise. Its share of a core stays what it was. A lower one
/// would make others wait for the locks that it holds meanwhile, those of the allocator first.
///
/// Kernels before 6.12 take no notice. Where the system refuses it, the thread runs on as it was.
pub fn run_in_short_turns() {
    // SAFETY: every field of the structure is a number, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let bytes = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the kernel writes at most `bytes` to a structure of that size; 0 is the calling thread.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, bytes, 0) };
    if known != 0 || attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return;
    }
    attributes.sched_runtime = TURN_NS;
    // SAFETY: the kernel only reads the structure, whose size it has.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "a background thread keeps its long turns");
    }
}

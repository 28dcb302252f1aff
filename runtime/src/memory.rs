//! How the allocator of the process treats large blocks.

/// Freed memory up to this much at the top of a heap stays with the process.
const TRIM_THRESHOLD_BYTES: i32 = 256 << 20;
/// Blocks below this come from a heap, not from a mapping of their own.
const MMAP_THRESHOLD_BYTES: i32 = 32 << 20;

/// Keeps freed blocks for the next allocation instead of unmapping them.
///
/// A shard frees and allocates write buffers of up to 1 MiB thousands of times a second. By default each of these is a
/// mapping of its own: unmapped when freed, and faulted in again page by page, which cost a node that publishes
/// 0.1 CPU seconds a GiB. To be called once, before threads are started.
pub fn keep_freed_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters of the allocator, and no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
    }
}

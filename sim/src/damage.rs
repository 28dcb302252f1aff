//! Damage at rest, and who is excused by it.
//!
//! What is damaged is looked up in the segments before it is changed, block by block, so that the oracle knows exactly
//! whose messages may be gone. A damaged block can cost others only where nothing on disk says any more that it was
//! durable: then it reads as a torn tail, and what was written after it goes with it. Source: `storage/README.md`,
//! "Recovery".

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use drava_protocol::PartitionId;
use drava_storage::block::{self, ExtentKind};

use crate::disk::FileState;
use crate::oracle::Oracle;
use crate::world::World;

const PAGE_BYTES: u64 = 4096;
/// Kinds of rows in a state extent.
const CHECKPOINT_ROW: u8 = 5;
const CHECKPOINT_PARTITION: u8 = 6;
const CHECKPOINT_END: u8 = 7;
const CHECKPOINT_EXTENT: u8 = 8;

struct FoundBlock {
    file: usize,
    /// Of its store: sequences count in each.
    dir: PathBuf,
    range: Range<u64>,
    sequence: u64,
    durable_sequence: u64,
    /// It has rows of a checkpoint.
    repeats: bool,
    /// It ends a checkpoint whose first row was read at this block.
    ends_checkpoint: Option<u64>,
    extents: Vec<(PartitionId, Range<u64>)>,
}

/// A block of the run, by the directory of its store.
pub type BlockName = (PathBuf, u64);

/// Changes one place of one segment, or deletes it. `is_open`: of a store that goes on writing. `draining` are the directories of those that
/// do not any more. `damaged` has all blocks that were damaged in this run.
pub fn damage(world: &World, oracle: &mut Oracle, damaged: &mut Vec<BlockName>, draining: &[PathBuf], is_open: bool) {
    let files: Vec<(PathBuf, Rc<FileState>)> =
        world.disk.files().into_iter().filter(|(_, file)| PAGE_BYTES < file.len()).collect();
    if files.is_empty() {
        return;
    }
    let mut blocks = Vec::new();
    for (index, (path, file)) in files.iter().enumerate() {
        find_blocks(index, path, file, &mut blocks);
    }
    let checkpoints: Vec<_> =
        blocks.iter().filter_map(|block| Some((&block.dir, block.ends_checkpoint?..block.sequence))).collect();
    let last_end = |dir: &PathBuf| {
        let of_store = checkpoints.iter().filter(|(found, _)| *found == dir);
        of_store.map(|(_, checkpoint)| checkpoint.end).max().unwrap_or(0)
    };
    let random = &world.random;
    let file = random.below(files.len() as u64) as usize;
    let (path, state) = &files[file];
    // Where blocks are, most of the time: the rest of a segment holds nothing to damage.
    let inside: Vec<&FoundBlock> = blocks.iter().filter(|block| block.file == file).collect();
    let position = match inside.is_empty() || random.one_in(10) {
        true => random.below(state.len()),
        false => random.in_range(random.pick(&inside).range.clone()),
    };
    let page = position / PAGE_BYTES * PAGE_BYTES;
    let range = match random.below(4) {
        0 => position..position + 1,
        1 => page..page + PAGE_BYTES,
        2 => position / 512 * 512..position / 512 * 512 + 512,
        _ => page..(page + PAGE_BYTES * random.in_range(1..4)).min(state.len()),
    };
    let delete = !is_open && random.one_in(12);
    let range = if delete { 0..state.len() } else { range };
    world.event(format_args!("damage {} {range:?}", path.display()));

    // Without its header nothing in a segment is believed that the index does not know.
    let header = range.start < PAGE_BYTES;
    for hit in blocks.iter().filter(|block| block.file == file) {
        if header || hit.range.start < range.end && range.start < hit.range.end {
            damaged.push((hit.dir.clone(), hit.sequence));
            excuse(oracle, hit);
            let mut within = checkpoints.iter().filter(|(dir, _)| **dir == hit.dir);
            let within =
                within.any(|(_, checkpoint)| checkpoint.start < hit.sequence && hit.sequence <= checkpoint.end);
            // One that is being written will have an end all the same. Those of old stores are not needed any more.
            let is_open = is_open && last_end(&hit.dir) < hit.sequence;
            oracle.checkpoint_damaged |= !draining.contains(&hit.dir) && (hit.repeats || within || is_open);
        }
    }
    excuse_unvouched(oracle, blocks, damaged);

    if delete {
        world.disk.delete(path);
        return;
    }
    let (start, end) = (range.start as usize, range.end as usize);
    match random.below(3) {
        _ if end - start == 1 => state.damage(|bytes| bytes[start] ^= 1 << random.below(8)),
        0 => state.damage(|bytes| bytes[start..end].fill(0)),
        1 => state.damage(|bytes| bytes[start..end].iter_mut().for_each(|byte| *byte = random.next() as u8)),
        _ => {
            // Another place of the disk answers.
            let other = random.below(state.len() / PAGE_BYTES) * PAGE_BYTES;
            let other = other.min(state.len() - (range.end - range.start)) as usize;
            state.damage(|bytes| bytes.copy_within(other..other + (end - start), start));
        }
    }
}

/// What became durable since something was damaged may be gone with it: what was in flight at that time does not say that
/// the damaged block was durable.
pub fn stopped(world: &World, oracle: &mut Oracle, damaged: &[BlockName]) {
    let mut blocks = Vec::new();
    for (index, (path, file)) in world.disk.files().iter().enumerate() {
        find_blocks(index, path, file, &mut blocks);
    }
    excuse_unvouched(oracle, blocks, damaged);
}

fn excuse_unvouched(oracle: &mut Oracle, mut blocks: Vec<FoundBlock>, damaged: &[BlockName]) {
    blocks.retain(|block| !damaged.iter().any(|(dir, sequence)| (dir, *sequence) == (&block.dir, block.sequence)));
    for (dir, sequence) in damaged {
        let of_store = || blocks.iter().filter(|block| block.dir == *dir);
        if !of_store().any(|block| *sequence <= block.durable_sequence) {
            of_store().filter(|block| *sequence < block.sequence).for_each(|block| excuse(oracle, block));
        }
    }
}

fn excuse(oracle: &mut Oracle, block: &FoundBlock) {
    for (partition, range) in &block.extents {
        oracle.damaged(*partition, range);
    }
}

fn find_blocks(file: usize, path: &Path, state: &FileState, out: &mut Vec<FoundBlock>) {
    let dir = path.parent().map(Path::to_owned).unwrap_or_default();
    // What is not durable yet may go before anybody can ask it what was.
    let bytes = state.media();
    // Page by page: a header that strayed here may claim what follows, and nothing but batches says that it is wrong.
    for position in (PAGE_BYTES as usize..bytes.len()).step_by(PAGE_BYTES as usize) {
        let Ok(header) = block::check(&bytes[position..]) else { continue };
        let extents: Vec<_> = block::extents(&header, &bytes[position..]).filter_map(Result::ok).collect();
        let rows = extents.iter().filter(|(extent, _)| extent.kind == ExtentKind::State).flat_map(|(extent, at)| {
            let start = position + at + block::EXTENT_HEADER_BYTES;
            rows(&bytes[start..start + extent.body_bytes as usize])
        });
        let (mut repeats, mut ends_checkpoint) = (false, None);
        for (kind, value) in rows {
            repeats |= [CHECKPOINT_ROW, CHECKPOINT_PARTITION, CHECKPOINT_END, CHECKPOINT_EXTENT].contains(&kind);
            if kind == CHECKPOINT_END {
                ends_checkpoint = value.first_chunk().map(|covered| u64::from_le_bytes(*covered));
            }
        }
        out.push(FoundBlock {
            file,
            dir: dir.clone(),
            range: position as u64..position as u64 + header.block_bytes as u64,
            sequence: header.id.sequence,
            durable_sequence: header.id.durable_sequence,
            repeats,
            ends_checkpoint,
            extents: extents
                .iter()
                .map(|(extent, _)| (extent.ledger.partition, extent.base_offset..extent.next_offset()))
                .collect(),
        });
    }
}

/// The kinds and values of the rows of a state extent.
fn rows(mut body: &[u8]) -> Vec<(u8, &[u8])> {
    let mut rows = Vec::new();
    while let Some((head, rest)) = body.split_first_chunk::<8>() {
        let key_bytes = u16::from_le_bytes([head[2], head[3]]) as usize;
        let value_bytes = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let Some(value) = rest.get(key_bytes..key_bytes + value_bytes) else { break };
        rows.push((head[0], value));
        body = body.get((8 + key_bytes + value_bytes).next_multiple_of(16)..).unwrap_or_default();
    }
    rows
}

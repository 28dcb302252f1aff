//! Damage at rest, and who is excused by it.
//!
//! What is damaged is looked up in the segments before it is changed, block by block, so that the oracle knows exactly
//! whose messages may be gone. A damaged block can cost others only where nothing on disk says any more that it was
//! durable: then it reads as a torn tail, and what was written after it goes with it. Source: `storage/README.md`,
//! "Recovery".

use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;

use drava_protocol::PartitionId;
use drava_storage::block;

use crate::disk::FileState;
use crate::oracle::Oracle;
use crate::world::World;

const PAGE_BYTES: u64 = 4096;

struct FoundBlock {
    file: usize,
    range: Range<u64>,
    sequence: u64,
    durable_sequence: u64,
    extents: Vec<(PartitionId, Range<u64>)>,
}

/// Changes one place of one segment. `sequences` are those of all blocks damaged in this run.
pub fn damage(world: &World, oracle: &mut Oracle, sequences: &mut Vec<u64>) {
    let files: Vec<(PathBuf, Rc<FileState>)> =
        world.disk.files().into_iter().filter(|(_, file)| PAGE_BYTES < file.len()).collect();
    if files.is_empty() {
        return;
    }
    let mut blocks = Vec::new();
    for (index, (_, file)) in files.iter().enumerate() {
        find_blocks(index, file, &mut blocks);
    }
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
    world.event(format_args!("damage {} {range:?}", path.display()));

    // Without its header nothing in a segment is believed that the index does not know.
    let header = range.start < PAGE_BYTES;
    for hit in blocks.iter().filter(|block| block.file == file) {
        if header || hit.range.start < range.end && range.start < hit.range.end {
            sequences.push(hit.sequence);
            excuse(oracle, hit);
        }
    }
    blocks.retain(|block| !sequences.contains(&block.sequence));
    for &sequence in &*sequences {
        if !blocks.iter().any(|block| sequence <= block.durable_sequence) {
            blocks.iter().filter(|block| sequence < block.sequence).for_each(|block| excuse(oracle, block));
        }
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

fn excuse(oracle: &mut Oracle, block: &FoundBlock) {
    for (partition, range) in &block.extents {
        oracle.damaged(*partition, range);
    }
}

fn find_blocks(file: usize, state: &FileState, out: &mut Vec<FoundBlock>) {
    // What is not durable yet may go before anybody can ask it what was.
    let bytes = state.media();
    // Page by page: a header that strayed here may claim what follows, and nothing but batches says that it is wrong.
    for position in (PAGE_BYTES as usize..bytes.len()).step_by(PAGE_BYTES as usize) {
        let Ok(header) = block::check(&bytes[position..]) else { continue };
        let extents = block::extents(&header, &bytes[position..]).filter_map(Result::ok);
        out.push(FoundBlock {
            file,
            range: position as u64..position as u64 + header.block_bytes as u64,
            sequence: header.id.sequence,
            durable_sequence: header.id.durable_sequence,
            extents: extents
                .map(|(extent, _)| (extent.ledger.partition, extent.base_offset..extent.next_offset()))
                .collect(),
        });
    }
}

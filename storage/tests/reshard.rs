//! A node that is started with another number of shards.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use drava_protocol::{PartitionId, ShardId};
use drava_storage::foreign::{drain, holders};
use drava_storage::reshard::{Moved, move_rows, seal};
use drava_storage::{GlommioIo, Index, IndexDb, PartitionLimits, ReadError, Store, StoreConfig, StoreId};

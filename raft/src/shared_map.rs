//! An ordered map whose versions share what they have in common.
//!
//! Its entries lie in chunks of at most [`CHUNK_ENTRIES_MAX`], each behind an `Arc`. A change copies one chunk and the
//! list of them, so that the next version of a hundred thousand entries costs microseconds, and what differs between two
//! versions is found by looking only at the chunks that they do not share.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Index, RangeBounds};
use std::sync::Arc;

/// Halved when it grows beyond. Small, because a change copies one; not too small, because it copies the list, too.
const CHUNK_ENTRIES_MAX: usize = 128;

#[derive(Clone)]
pub struct SharedMap<K, V> {
    /// None is empty, and each ends before the next begins.
    chunks: Vec<Arc<BTreeMap<K, V>>>,
    len: usize,
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        SharedMap { chunks: Vec::new(), len: 0 }
    }
}

impl<K: Ord, V> SharedMap<K, V> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.chunks.get(self.chunk_of(key))?.get(key)
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// In the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// The entries within a range, in the order of the keys. Like the standard map, it panics when the range ends
    /// before it begins.
    pub fn range<Q: Ord + ?Sized, R: RangeBounds<Q>>(&self, range: R) -> impl Iterator<Item = (&K, &V)>
    where
        K: Borrow<Q>,
    {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let first = match range.start_bound() {
            Included(key) | Excluded(key) => self.chunk_of(key),
            Unbounded => 0,
        };
        let chunks = self.chunks[first..].iter();
        chunks.flat_map(move |chunk| chunk.range::<Q, _>((range.start_bound(), range.end_bound())))
    }

    /// The first chunk that does not end before a key.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        self.chunks.partition_point(|chunk| chunk.last_key_value().is_some_and(|(last, _)| last.borrow() < key))
    }
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// Returns the value that was there before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if self.chunks.is_empty() {
            self.chunks.push(Arc::default());
        }
        // A key beyond the last goes to the last chunk.
        let at = self.chunk_of(&key).min(self.chunks.len() - 1);
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        let before = chunk.insert(key, value);
        self.len += usize::from(before.is_none());
        if CHUNK_ENTRIES_MAX < chunk.len() {
            let middle = chunk.keys().nth(chunk.len() / 2).expect("a full chunk has a middle").clone();
            let upper = chunk.split_off(&middle);
            self.chunks.insert(at + 1, Arc::new(upper));
        }
        before
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = self.chunk_of(key);
        self.chunks.get(at)?.get(key)?;
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        let removed = chunk.remove(key);
        self.len -= 1;
        let left = chunk.len();
        // What is left of many deletions joins its neighbour.
        let next = self.chunks.get(at + 1).map_or(0, |next| next.len());
        if left == 0 {
            self.chunks.remove(at);
        } else if 0 < next && left + next <= CHUNK_ENTRIES_MAX / 2 {
            let mut next = Arc::unwrap_or_clone(self.chunks.remove(at + 1));
            Arc::make_mut(&mut self.chunks[at]).append(&mut next);
        }
        removed
    }

    /// The keys whose value is not the same in another version: added, removed or changed. In order.
    pub fn changed_since(&self, older: &SharedMap<K, V>) -> Vec<K>
    where
        V: PartialEq,
    {
        // One change leaves all chunks before it and behind it where they were.
        let same = |(a, b): &(&Arc<_>, &Arc<_>)| Arc::ptr_eq(a, b);
        let before = self.chunks.iter().zip(&older.chunks).take_while(same).count();
        let (here, there) = (&self.chunks[before..], &older.chunks[before..]);
        let behind = here.iter().rev().zip(there.iter().rev()).take_while(same).count();
        let (here, there) = (&here[..here.len() - behind], &there[..there.len() - behind]);

        let pointers = |chunks: &[Arc<BTreeMap<K, V>>]| chunks.iter().map(Arc::as_ptr).collect::<BTreeSet<_>>();
        let (in_here, in_there) = (pointers(here), pointers(there));
        let own_here = here.iter().filter(|chunk| !in_there.contains(&Arc::as_ptr(chunk)));
        let own_there = there.iter().filter(|chunk| !in_here.contains(&Arc::as_ptr(chunk)));
        let mut changed = BTreeSet::new();
        for chunk in own_here.chain(own_there) {
            changed.extend(chunk.keys().filter(|key| self.get(key) != older.get(key)).cloned());
        }
        changed.into_iter().collect()
    }
}

impl<K: Ord, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<K: Ord, V: Eq> Eq for SharedMap<K, V> {}

impl<K: Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Borrow<Q>, Q: Ord + ?Sized, V> Index<&Q> for SharedMap<K, V> {
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("the key is in the map")
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = SharedMap::new();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Bound;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn check(map: &SharedMap<u32, u32>, model: &BTreeMap<u32, u32>) {
        assert_eq!(map.len(), model.len());
        assert!(map.iter().eq(model.iter()));
        assert!(map.chunks.iter().all(|chunk| (1..=CHUNK_ENTRIES_MAX).contains(&chunk.len())));
    }

    #[test]
    fn it_does_what_the_standard_map_does() {
        let mut random = StdRng::seed_from_u64(7);
        let (mut map, mut model) = (SharedMap::new(), BTreeMap::new());
        for step in 0..20_000u32 {
            let key = random.random_range(0..2000);
            // First it grows, then it shrinks.
            let removes = if step < 10_000 { 1 } else { 3 };
            if random.random_range(0..4) < removes {
                assert_eq!(map.remove(&key), model.remove(&key));
            } else {
                assert_eq!(map.insert(key, step), model.insert(key, step));
            }
            assert_eq!(map.get(&key), model.get(&key));
            if step % 500 == 0 {
                check(&map, &model);
                let from = random.random_range(0..2000);
                let bounds = (Bound::Excluded(from), Bound::Included(from + 300));
                assert!(map.range(bounds).eq(model.range(bounds)));
            }
        }
        check(&map, &model);
        for key in model.keys() {
            map.remove(key);
        }
        assert!(map.is_empty() && map.chunks.is_empty());
    }

    #[test]
    fn versions_know_what_changed_between_them() {
        let mut random = StdRng::seed_from_u64(8);
        let mut map: SharedMap<u32, u32> = (0..3000).map(|key| (key, 0)).collect();
        for round in 1..200 {
            let older = map.clone();
            for _ in 0..random.random_range(0..5) {
                let key = random.random_range(0..4000);
                match random.random_range(0..3) {
                    0 => drop(map.remove(&key)),
                    _ => drop(map.insert(key, round)),
                }
            }
            let expected: Vec<u32> = (0..4000).filter(|key| map.get(key) != older.get(key)).collect();
            assert_eq!(map.changed_since(&older), expected);
            assert_eq!(map == older, expected.is_empty());
        }
    }

    #[test]
    fn a_change_copies_one_chunk() {
        let older: SharedMap<u32, u32> = (0..10_000).map(|key| (key, key)).collect();
        let mut newer = older.clone();
        newer.insert(5000, 0);
        let shared = newer.chunks.iter().zip(&older.chunks).filter(|(new, old)| Arc::ptr_eq(new, old)).count();
        assert_eq!(shared, older.chunks.len() - 1);
        assert_eq!(older[&5000], 5000);
    }
}

//! What a guest has sent and its peer on the host has not taken yet: a ring of bytes of one fixed
//! size, which is what the guest may be promised room for. Used by workers that carry streams.

/// Bytes that a guest may send ahead. Allocated at the first that must wait, in one piece.
pub const ROOM: usize = 256 << 10;

/// Bytes that wait.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Backlog {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many more it takes.
    pub fn room(&self) -> usize {
        ROOM.saturating_sub(self.len)
    }

    /// None does.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds bytes; false, and nothing is added, if they have no room.
    pub fn push(&mut self, mut more: &[u8]) -> bool {
        if more.len() > self.room() {
            return false;
        }
        if self.bytes.is_empty() && !more.is_empty() {
            self.bytes = vec![0; ROOM];
        }
        while !more.is_empty() {
            let at = self.start.saturating_add(self.len).checked_rem(ROOM);
            let end = ROOM;
            let Some(place) = at.and_then(|at| self.bytes.get_mut(at..end)) else {
                return false;
            };
            let count = place.len().min(more.len());
            let (now, later) = more.split_at_checked(count).unwrap_or_default();
            if let Some(place) = place.get_mut(..count) {
                place.copy_from_slice(now);
            }
            self.len = self.len.saturating_add(count);
            more = later;
        }
        true
    }

    /// The first bytes that lie in one piece.
    pub fn front(&self) -> &[u8] {
        let end = self.start.saturating_add(self.len).min(ROOM);
        self.bytes.get(self.start..end).unwrap_or_default()
    }

    /// So many have gone.
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len = self.len.saturating_sub(count);
        self.start = match self.len {
            0 => 0,
            _ => self.start.saturating_add(count) % ROOM,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in prop::collection::vec((0usize..100_000, 0usize..100_000), 1..40)) {
            let mut backlog = Backlog::default();
            let (mut put, mut taken, mut inside) = (0_u64, 0_u64, 0_usize);
            let byte = |n: u64| (n % 251) as u8;
            for (add, take) in steps {
                let more: Vec<u8> = (0..add as u64).map(|i| byte(put + i)).collect();
                let fits = inside + add <= ROOM;
                prop_assert_eq!(backlog.push(&more), fits);
                if fits {
                    put += add as u64;
                    inside += add;
                }
                let mut left = take.min(inside);
                while left > 0 {
                    let front = backlog.front();
                    let count = front.len().min(left);
                    prop_assert!(count > 0);
                    prop_assert!((0..count).all(|i| front[i] == byte(taken + i as u64)));
                    backlog.advance(count);
                    taken += count as u64;
                    left -= count;
                    inside -= count;
                }
                prop_assert_eq!(backlog.len(), inside);
            }
        }
    }
}

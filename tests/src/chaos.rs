//! What `make chaos` gives the tests along: how many kills, and a seed for every moment and choice
//! that they pick; and what they injected, said as it happens.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Kills in the long forms, unless BULKHEAD_KILLS says otherwise.
pub fn kills(default: u32) -> u32 {
    let given = std::env::var("BULKHEAD_KILLS").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// BULKHEAD_SEED, or 0.
pub fn seed() -> u64 {
    let given = std::env::var("BULKHEAD_SEED").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// A moment below `most`, the same for the same seed, name and turn: sleeps until it.
pub fn pause(name: &str, turn: u64, most: Duration) -> Duration {
    let most = u64::try_from(most.as_millis()).unwrap_or(u64::MAX).max(1);
    let pause = Duration::from_millis(number(name, turn) % most);
    std::thread::sleep(pause);
    pause
}

/// A number that the seed, a name and a turn determine (SplitMix64's step over their hash).
pub fn number(name: &str, turn: u64) -> u64 {
    let mut hash = seed() ^ 0xcbf2_9ce4_8422_2325;
    for byte in name.bytes().chain(turn.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut z = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Says what was injected, if this is a part of `make chaos`.
pub fn injected(what: &str) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if std::env::var_os("BULKHEAD_KILLS").is_some() {
        let number = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        println!("injected {number}: {what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_differ_by_name_and_turn_and_are_the_same_again() {
        let numbers: Vec<u64> = (0..100).map(|turn| number("x", turn) % 1000).collect();
        let again: Vec<u64> = (0..100).map(|turn| number("x", turn) % 1000).collect();
        assert_eq!(numbers, again);
        let distinct: std::collections::BTreeSet<_> = numbers.iter().collect();
        assert!(distinct.len() > 80, "{numbers:?}");
        assert_ne!(number("x", 1), number("y", 1));
    }
}

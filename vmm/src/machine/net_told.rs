//! What was told of a back-end of somebody else's, so that one that fails again and again is told
//! of once for each reason. Manager thread only.

use std::time::{Duration, Instant};

/// Most reasons that are told until a back-end has served, or come after a while.
const MAX_REASONS: usize = 8;
/// How often at most it is told that a back-end has come.
pub const CAME_INTERVAL: Duration = Duration::from_secs(60);
/// How often surplus connections are told of.
pub const SURPLUS_INTERVAL: Duration = Duration::from_secs(60);

/// What was told since a back-end last served for a while.
#[derive(Debug, Default)]
pub struct Told {
    /// Why it is not served.
    reasons: Vec<String>,
    /// When it was last told that a back-end has come.
    came: Option<Instant>,
    /// When a surplus connection was last told of, and how many were not since.
    surplus: (Option<Instant>, u64),
}

/// A reason without its long numbers: what a peer has sent may stand in it.
fn kind(why: &str) -> String {
    let words = why.split(|c: char| !c.is_ascii_alphanumeric());
    let plain = |word: &str| {
        let long = word.len() > 3 && word.bytes().all(|byte| byte.is_ascii_digit());
        !long && !word.starts_with("0x")
    };
    let words: Vec<&str> = words.filter(|word| plain(word)).collect();
    words.join(" ")
}

impl Told {
    /// Notes a reason; false when it was told already, but for numbers that whoever fails may
    /// choose anew each time, or when there were too many.
    pub fn news(&mut self, why: &str) -> bool {
        let why = kind(why);
        let new = self.reasons.len() < MAX_REASONS && !self.reasons.contains(&why);
        if new {
            self.reasons.push(why);
        }
        new
    }

    /// A back-end has come. True: that is to be told, and then whatever comes next, too: it must
    /// not be the last that is told of one that is gone.
    pub fn came(&mut self, now: Instant) -> bool {
        let recent = |at| now.saturating_duration_since(at) < CAME_INTERVAL;
        if self.came.is_some_and(recent) {
            return false;
        }
        self.came = Some(now);
        self.reasons.clear();
        true
    }

    /// A back-end has served for a while: everything is news again.
    pub fn clear(&mut self) {
        self.reasons.clear();
        self.came = None;
    }

    /// A connection was closed since there is a back-end. What is to be told of it, if anything.
    pub fn surplus(&mut self, now: Instant) -> Option<String> {
        let (last, quiet) = &mut self.surplus;
        if last.is_some_and(|at| now.saturating_duration_since(at) < SURPLUS_INTERVAL) {
            *quiet = quiet.saturating_add(1);
            return None;
        }
        *last = Some(now);
        let more = match std::mem::take(quiet) {
            0 => String::new(),
            n => format!(" ({n} more were not told of)"),
        };
        Some(format!(
            "a connection to its socket was closed: it has a back-end, or another waits{more}"
        ))
    }
}

//! The kernel's trace buffer as `trace_pipe_raw` gives it: pages of records with times
//! (include/linux/ring_buffer.h; `events/header_page` and `header_event` of tracefs).

/// A page's records begin here.
const HEADER: usize = 16;
/// The bytes of a page that are records; above it, flags.
const SIZE: u64 = 0xf_ffff;
/// Records were lost before this page.
const MISSED: u64 = 1 << 31;

const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// An integer of a record, in the machine's order.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    word(bytes, at).map(u32::from_ne_bytes)
}

/// The same of eight bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    word(bytes, at).map(u64::from_ne_bytes)
}

/// Calls `each` with every record of the page and its time. Whether some were lost before it;
/// `None`: not a page.
pub fn records(page: &[u8], mut each: impl FnMut(u64, &[u8])) -> Option<bool> {
    let mut time = u64_at(page, 0)?;
    let commit = u64_at(page, 8)?;
    let end = HEADER.checked_add(usize::try_from(commit & SIZE).ok()?)?;
    let records = page.get(..end)?;
    let mut at = HEADER;
    while at < end {
        let head = u32_at(records, at)?;
        let (kind, delta) = (head & 31, u64::from(head >> 5));
        at += 4;
        match kind {
            PADDING if delta == 0 => break,
            PADDING => at += usize::try_from(u32_at(records, at)?).ok()?,
            TIME_EXTEND => {
                time += (u64::from(u32_at(records, at)?) << 27) + delta;
                at += 4;
            }
            TIME_STAMP => {
                // The top five bits are those of the page's time.
                let low = (u64::from(u32_at(records, at)?) << 27) + delta;
                time = (time & (0x1f << 59)) | low;
                at += 4;
            }
            kind => {
                time += delta;
                let length = match kind {
                    // It is in the first word, which counts itself.
                    0 => usize::try_from(u32_at(records, at)?).ok()?,
                    words => usize::try_from(words).ok()? * 4,
                };
                let from = if kind == 0 { at + 4 } else { at };
                each(time, records.get(from..at.checked_add(length)?)?);
                at += length;
            }
        }
    }
    Some(commit & MISSED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(words: &[u32]) -> Vec<u8> {
        let mut page = Vec::new();
        page.extend(1000_u64.to_ne_bytes());
        page.extend((words.len() as u64 * 4).to_ne_bytes());
        for word in words {
            page.extend(word.to_ne_bytes());
        }
        page.resize(4096, 0);
        page
    }

    #[test]
    fn records_of_every_kind_are_found_in_their_order() {
        let page = page(&[
            2 | 5 << 5, // two words, five later
            0xa,
            0xb,
            TIME_EXTEND | 1 << 5, // 2^27 + 1 later
            1,
            7 << 5, // its length in a word of its own: eight with that word
            8,
            0xc,
            PADDING | 1 << 5, // padding of one word
            4,
            1, // one word, at the same time
            0xd,
        ]);
        let mut seen = Vec::new();
        let missed = records(&page, |time, bytes| {
            seen.push((time, bytes.len(), u32_at(bytes, 0)));
        });
        assert_eq!(missed, Some(false));
        let later = 1005 + (1 << 27) + 1;
        assert_eq!(
            seen,
            [
                (1005, 8, Some(0xa)),
                (later + 7, 4, Some(0xc)),
                (later + 7, 4, Some(0xd))
            ]
        );
    }

    #[test]
    fn what_was_lost_is_told_and_what_is_no_page_is_refused() {
        let mut lossy = page(&[1, 0xa]);
        lossy[8..16].copy_from_slice(&(8 | MISSED).to_ne_bytes());
        assert_eq!(records(&lossy, |_, _| {}), Some(true));
        assert_eq!(records(&[0; 8], |_, _| {}), None);
        let beyond = page(&[28, 1]);
        assert_eq!(records(&beyond, |_, _| {}), None);
    }
}

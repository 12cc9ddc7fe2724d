//! What the hostile programs are told: copies of them, with the victim's socket, cgroup and
//! processes and the thread that attacks written behind their mark
//! (`device-procs/runtime/src/hostile/told.rs`).

use std::path::Path;

use crate::victim::Victim;

const MARK: &[u8] = b"BULKHEAD-HOSTILE-IS-TOLD";
const ROOM: usize = 1000;

/// Copies the program and tells the copy.
///
/// # Errors
/// It cannot be read or written, or is no hostile build of today's.
pub fn copy(from: &Path, to: &str, thread: &str, victim: &Victim) -> Result<(), String> {
    let named = from.display().to_string();
    let mut program = std::fs::read(from).map_err(|e| format!("{named}: {e}"))?;
    let [vmm, launcher, device] = victim.first_pids()?;
    let mut text = format!(
        "thread={thread}\nsocket={}\ncgroup={}\nvmm={vmm}\nlauncher={launcher}\ndevice={device}\n",
        victim.socket,
        victim.cgroup(device)?
    )
    .into_bytes();
    if text.len() > ROOM {
        return Err(format!("{} bytes are more than it can be told", text.len()));
    }
    text.resize(ROOM, b' ');
    let places: Vec<usize> = (0..program.len())
        .filter(|at| {
            program
                .get(*at..)
                .is_some_and(|rest| rest.starts_with(MARK))
        })
        .collect();
    let [place] = places.as_slice() else {
        return Err(format!(
            "{named}: has the mark of a hostile build {} times",
            places.len()
        ));
    };
    let start = place.saturating_add(MARK.len());
    let room = program.get_mut(start..start.saturating_add(ROOM));
    room.ok_or_else(|| format!("{named}: ends behind its mark"))?
        .copy_from_slice(&text);
    std::fs::write(to, program).map_err(|e| format!("{to}: {e}"))?;
    // As executable as it was.
    let mode = std::fs::metadata(from).map_err(|e| format!("{named}: {e}"))?;
    std::fs::set_permissions(to, mode.permissions()).map_err(|e| format!("{to}: {e}"))
}

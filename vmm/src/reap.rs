//! `bulkhead reap`: removes what VMs have left on the host that were ended by a power cut, or
//! whose VMM and launcher were killed at once. It runs in the command line's process.
//!
//! | what | how it is known for ours | how a live VM's is told |
//! |---|---|---|
//! | notes `vm-PID-START.run` in the run directory | name and owner | locked by its VMM and launcher |
//! | sockets | listed in such a note, by device and inode | the note's lock; and nobody listens |
//! | directories made for API sockets | the same | the note's lock; and nothing is in them |
//! | cgroups `bulkhead-vm-PID-START` | name and the leaves in it | locked; and no process is in it |
//!
//! A lock ends with the last process that holds it, whatever ended that: no pid is trusted,
//! which another process, or another pid namespace, may have. Taps that bulkhead makes, locks on
//! disks and the processes themselves end with their VM by the kernel's doing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::launcher::cgroup_parent::{GROUP_PREFIX, Mount};
use crate::launcher::cgroup_sys::{open_beneath, remove_directory, try_lock};
use crate::launcher::leftovers::{self, MAX_NOTE};
use crate::launcher::packet::somebody_listens;
use crate::launcher::{LEAF_PREFIX, VMM_LEAF, printable};

/// Directories of cgroup v2 that are looked at, and how deep.
const MAX_CGROUPS: usize = 100_000;
const MAX_DEPTH: usize = 24;

/// Options of `bulkhead reap`.
#[derive(clap::Args, Debug, Clone)]
pub struct ReapArgs {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What was found.
#[derive(Debug, Default)]
struct Reaper {
    dry_run: bool,
    lines: Vec<String>,
    live: BTreeSet<String>,
    removed: usize,
    failed: usize,
}

/// Reaps and says what; 0 unless something could not be removed.
pub fn run(args: &ReapArgs) -> i32 {
    let mut reaper = Reaper {
        dry_run: args.dry_run,
        ..Reaper::default()
    };
    if let Some(directory) = leftovers::directory() {
        reaper.notes(&directory);
    }
    if let Some(mount) = Mount::find() {
        let mut seen = 0;
        reaper.cgroups(&mount.place, 0, &mut seen);
    }
    let mut text = reaper.lines.concat();
    let done = if args.dry_run {
        "would be removed"
    } else {
        "removed"
    };
    text.push_str(&format!(
        "{} {done}, {} not; {} VMs live\n",
        reaper.removed,
        reaper.failed,
        reaper.live.len()
    ));
    let mut out = std::io::stdout();
    // A reader that has closed the pipe has what it wanted.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    i32::from(reaper.failed > 0)
}

impl Reaper {
    /// Removes a thing, or says that it would.
    fn remove(&mut self, what: &str, path: &Path, remove: impl FnOnce() -> std::io::Result<()>) {
        let name = printable(&path.to_string_lossy());
        let line = if self.dry_run {
            self.removed = self.removed.saturating_add(1);
            format!("would remove {what} {name}\n")
        } else {
            match remove() {
                Ok(()) => {
                    self.removed = self.removed.saturating_add(1);
                    format!("removed {what} {name}\n")
                }
                Err(error) => {
                    self.failed = self.failed.saturating_add(1);
                    format!("cannot remove {what} {name}: {error}\n")
                }
            }
        };
        self.lines.push(line);
    }

    /// Every note in the run directory, and what it lists.
    fn notes(&mut self, directory: &Path) {
        for path in entries(directory) {
            let name = path.file_name().and_then(|name| name.to_str());
            let named = name.and_then(|name| {
                name.strip_prefix(leftovers::PREFIX)?
                    .strip_suffix(leftovers::SUFFIX)
            });
            if let Some(vm) = named.filter(|name| is_vm_name(name)) {
                self.note(&path, vm);
            }
        }
    }

    fn note(&mut self, path: &Path, vm: &str) {
        let Ok(there) = fs::symlink_metadata(path) else {
            return;
        };
        let own = fs::metadata(path.parent().unwrap_or(path)).map(|d| d.uid());
        if !there.is_file() || !own.is_ok_and(|uid| uid == there.uid()) {
            return;
        }
        let Ok(file) = File::open(path) else {
            return;
        };
        match try_lock(&file) {
            Ok(true) => {}
            Ok(false) => {
                self.live.insert(vm.to_owned());
                return;
            }
            Err(_) => return,
        }
        let mut bytes = Vec::new();
        let read = (&file).take(MAX_NOTE).read_to_end(&mut bytes);
        if read.is_err() || !leftovers::is_at(&file, path) {
            return;
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut going = BTreeSet::new();
        for socket in leftovers::sockets(&text) {
            let place = &socket.path;
            let ours = fs::symlink_metadata(place).is_ok_and(|there| {
                there.file_type().is_socket() && (there.dev(), there.ino()) == socket.identity
            });
            if ours && matches!(somebody_listens(place), Ok(false)) {
                self.remove("socket", place, || fs::remove_file(place));
                going.insert(socket.path.clone());
            }
        }
        // One may lie in another that was made before it.
        for directory in leftovers::directories(&text).into_iter().rev() {
            let place = &directory.path;
            let ours = fs::symlink_metadata(place).is_ok_and(|there| {
                there.is_dir() && (there.dev(), there.ino()) == directory.identity
            });
            // A dry run leaves the sockets in it.
            let empty = entries(place).iter().all(|entry| going.contains(entry));
            if ours && empty {
                self.remove("directory", place, || fs::remove_dir(place));
                going.insert(directory.path.clone());
            }
        }
        self.remove("note", path, || fs::remove_file(path));
    }

    /// Every cgroup below a directory.
    fn cgroups(&mut self, directory: &Path, depth: usize, seen: &mut usize) {
        if depth > MAX_DEPTH {
            return;
        }
        for path in entries(directory) {
            *seen = seen.saturating_add(1);
            if *seen > MAX_CGROUPS || !fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
                continue;
            }
            let name = path.file_name().and_then(|name| name.to_str());
            let ours = name.and_then(|name| name.strip_prefix(GROUP_PREFIX));
            match (ours.is_some_and(is_vm_name), name) {
                (true, Some(name)) => self.cgroup(directory, &path, name),
                _ => self.cgroups(&path, depth.saturating_add(1), seen),
            }
        }
    }

    fn cgroup(&mut self, parent: &Path, path: &Path, name: &str) {
        let Ok(directory) = File::open(path) else {
            return;
        };
        // Another user's is that user's to remove, or root's.
        let user = bulkhead_proto::sys::effective_uid();
        if user != 0 && !directory.metadata().is_ok_and(|there| there.uid() == user) {
            return;
        }
        match try_lock(&directory) {
            Ok(true) => {}
            Ok(false) => {
                let vm = name.strip_prefix(GROUP_PREFIX).unwrap_or(name);
                self.live.insert(vm.to_owned());
                return;
            }
            Err(_) => return,
        }
        let populated = fs::read_to_string(path.join("cgroup.events"))
            .map_or(true, |text| text.lines().any(|line| line == "populated 1"));
        if populated {
            let name = printable(&path.to_string_lossy());
            self.lines
                .push(format!("left cgroup {name}: processes are in it\n"));
            return;
        }
        for leaf in entries(path) {
            let name = leaf.file_name().and_then(|name| name.to_str());
            if let Some(name) = name
                && (name == VMM_LEAF || name.starts_with(LEAF_PREFIX))
                && leaf.is_dir()
            {
                self.remove("cgroup", &leaf, || remove_directory(&directory, name));
            }
        }
        self.remove("cgroup", path, || {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY;
            let parent = File::open(parent)?;
            // By what is locked, not by what has its name by now.
            open_beneath(&parent, name, flags)?;
            remove_directory(&parent, name)
        });
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// PID-START, as VMs are called.
fn is_vm_name(name: &str) -> bool {
    let number = |text: &str| {
        !text.is_empty() && text.len() <= 20 && text.bytes().all(|b| b.is_ascii_digit())
    };
    name.split_once('-')
        .is_some_and(|(pid, start)| number(pid) && number(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn bed(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("bh-reap-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    fn note(directory: &Path, name: &str, sockets: &[&Path]) -> PathBuf {
        let mut text = String::new();
        for socket in sockets {
            let there = fs::symlink_metadata(socket).unwrap();
            let (dev, ino) = (there.dev(), there.ino());
            text.push_str(&format!("socket {dev} {ino} {}\n", socket.display()));
        }
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn reap(bed: &Path, dry_run: bool) -> Reaper {
        let mut reaper = Reaper {
            dry_run,
            ..Reaper::default()
        };
        reaper.notes(bed);
        reaper
    }

    #[test]
    fn what_is_stale_goes_and_what_lives_or_is_a_strangers_stays() {
        let bed = bed("notes");
        let at = |name: &str| bed.join(name);
        let stale = at("stale.sock");
        drop(UnixListener::bind(&stale).unwrap());
        let heard = at("heard.sock");
        let _listener = UnixListener::bind(&heard).unwrap();
        let live = at("live.sock");
        drop(UnixListener::bind(&live).unwrap());
        // Another socket is where one was noted.
        let replaced = at("replaced.sock");
        drop(UnixListener::bind(&replaced).unwrap());
        let dead_note = note(&bed, "vm-1-2.run", &[&stale, &heard, &replaced]);
        fs::rename(&replaced, at("moved.sock")).unwrap();
        drop(UnixListener::bind(&replaced).unwrap());
        let live_note = note(&bed, "vm-3-4.run", &[&live]);
        let holder = File::open(&live_note).unwrap();
        assert!(try_lock(&holder).unwrap());
        let stranger = note(&bed, "vm-x.run", &[&live]);

        let reap = |dry_run| reap(&bed, dry_run);
        let dry = reap(true);
        assert_eq!((dry.removed, dry.live.len(), dry.failed), (2, 1, 0));
        assert!(stale.exists() && dead_note.exists());
        let wet = reap(false);
        assert_eq!(
            (wet.removed, wet.live.len(), wet.failed),
            (2, 1, 0),
            "{wet:?}"
        );
        assert!(!stale.exists() && !dead_note.exists());
        for kept in [&heard, &live, &replaced, &live_note, &stranger] {
            assert!(kept.exists(), "{}", kept.display());
        }
        // Its VM is gone, too.
        drop(holder);
        assert_eq!(reap(false).removed, 2);
        assert!(!live.exists() && !live_note.exists() && stranger.exists());
        fs::remove_dir_all(&bed).unwrap();
    }

    #[test]
    fn a_directory_that_was_made_for_sockets_goes_with_them_when_it_is_empty() {
        let bed = bed("made");
        let line = |what: &str, path: &Path| {
            let there = fs::symlink_metadata(path).unwrap();
            let (dev, ino) = (there.dev(), there.ino());
            format!("{what} {dev} {ino} {}\n", path.display())
        };
        let [made, used, other] = ["made", "used", "other"].map(|name| bed.join(name));
        let mut text = String::new();
        for directory in [&made, &used, &other] {
            fs::create_dir(directory).unwrap();
            let socket = directory.join("api");
            drop(UnixListener::bind(&socket).unwrap());
            text.push_str(&line("socket", &socket));
            text.push_str(&line("directory", directory));
        }
        fs::write(used.join("file"), "x").unwrap();
        // Another directory is where one was noted.
        fs::rename(&other, bed.join("moved")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(bed.join("vm-5-6.run"), text).unwrap();
        let reap = |dry_run| reap(&bed, dry_run);
        // Two sockets, a directory, the note.
        assert_eq!(reap(true).removed, 4);
        assert!(made.join("api").exists());
        let wet = reap(false);
        assert_eq!((wet.removed, wet.failed), (4, 0), "{wet:?}");
        assert!(!made.exists() && used.join("file").exists() && other.exists());
        assert!(bed.join("moved/api").exists());
        fs::remove_dir_all(&bed).unwrap();
    }

    #[test]
    fn a_note_that_is_a_link_or_nonsense_removes_nothing_else() {
        let bed = bed("links");
        let precious = bed.join("precious");
        fs::write(&precious, "x").unwrap();
        std::os::unix::fs::symlink(&precious, bed.join("vm-1-1.run")).unwrap();
        let there = fs::metadata(&precious).unwrap();
        let line = format!(
            "socket {} {} {}\n",
            there.dev(),
            there.ino(),
            precious.display()
        );
        fs::write(
            bed.join("vm-2-2.run"),
            format!("\u{0}junk\nsocket x\n{line}"),
        )
        .unwrap();
        let mut reaper = Reaper::default();
        reaper.notes(&bed);
        assert_eq!(reaper.removed, 1, "{reaper:?}");
        assert!(precious.exists() && bed.join("vm-1-1.run").is_symlink());
        fs::remove_dir_all(&bed).unwrap();
    }

    #[test]
    fn names_of_vms_are_two_numbers() {
        assert!(is_vm_name("12-345"));
        for other in [
            "",
            "-",
            "12",
            "a-1",
            "1-",
            "1-2-3",
            "123456789012345678901-1",
        ] {
            assert!(!is_vm_name(other), "{other}");
        }
    }
}

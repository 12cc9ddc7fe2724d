//! External helpers, by the only kind there is: passt, where it is installed, unpacked by
//! `tests/setup/passt`, or named by BULKHEAD_PASST.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_vmm::launcher::{ExitOutcome, Launcher, LauncherError, Program, SpawnedHelper};
use bulkhead_vmm::vhost_user::Frontend;

use super::bed::{Bed, alive, proc_field, root, soon};
use super::next_exit;

/// A passt with vhost-user. `None`, with a note, where there is none.
pub fn passt() -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cache/passt/passt");
    let named = std::env::var_os("BULKHEAD_PASST").map(PathBuf::from);
    let found = named.or_else(|| unpacked.canonicalize().ok());
    if found.is_none() {
        eprintln!("not tested here: no passt: run tests/setup/passt, or set BULKHEAD_PASST");
    }
    found
}

fn with_passt(bed: &Bed, path: &Path) -> Launcher {
    let mut config = bed.config();
    config.helpers.push(Program::find(Some(path)).unwrap());
    Launcher::start(&config).unwrap()
}

fn speaks(helper: &SpawnedHelper) -> u64 {
    let vhost = helper.vhost.try_clone().unwrap();
    let frontend = Frontend::connect(vhost, Duration::from_secs(10)).unwrap();
    frontend.features()
}

#[test]
fn given_passt_then_it_speaks_and_has_the_hosts_network_and_nothing_else() {
    let Some(path) = passt() else { return };
    let bed = Bed::new("passt");
    let launcher = with_passt(&bed, &path);
    let helper = launcher
        .spawn_helper("net0", "passt", 1, vec!["mtu=1400".into()])
        .unwrap();
    assert_ne!(speaks(&helper) & (1 << 32), 0, "VIRTIO_F_VERSION_1");

    let pid = helper.pid;
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(proc_field(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(proc_field(pid, "NoNewPrivs"), "1");
    assert_eq!(proc_field(pid, "Seccomp"), "2");
    let of = |who: &str, kind: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
    let pid_text = pid.to_string();
    assert_eq!(of(&pid_text, "net"), of("self", "net"));
    for kind in ["user", "mnt", "pid", "ipc", "uts", "cgroup"] {
        assert_ne!(of(&pid_text, kind), of("self", kind), "{kind}");
    }
    // Its own empty root, not the one with libraries that it started in.
    soon("passt's own sandbox", || {
        fs::read_dir(format!("/proc/{pid}/root/")).is_ok_and(|dir| dir.count() == 0)
    });
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(cmdline.contains("--mtu\x001400"), "{cmdline:?}");
    if root() {
        let uid = proc_field(pid, "Uid");
        let uid: u32 = uid.split_whitespace().next().unwrap().parse().unwrap();
        assert!(uid >= 0x7000_0000, "{uid}");
    }

    // The end of its channel is its own end.
    drop(helper);
    let (id, incarnation, outcome) = next_exit(&launcher);
    assert_eq!((id.as_str(), incarnation), ("net0", 1));
    assert_eq!(outcome, ExitOutcome::Status(0));
}

#[test]
fn given_a_launcher_that_ends_then_passt_ends_too() {
    let Some(path) = passt() else { return };
    let bed = Bed::new("passt-ends");
    let launcher = with_passt(&bed, &path);
    let helper = launcher
        .spawn_helper("net0", "passt", 1, Vec::new())
        .unwrap();
    speaks(&helper);
    let again = launcher.spawn_helper("net0", "passt", 1, Vec::new());
    assert!(matches!(again, Err(LauncherError::Refused(why)) if why.contains("incarnation 1")));
    drop(launcher);
    soon("passt's end", || !alive(helper.pid));
}

#[test]
fn given_a_launcher_without_helpers_then_it_starts_none() {
    let bed = Bed::new("no-passt");
    let launcher = bed.launcher();
    let refused = |kind: &str, options: &[&str]| {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        match launcher.spawn_helper("net0", kind, 1, options) {
            Err(LauncherError::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused("passt", &[]).contains("--passt PATH"));
    assert!(refused("sh", &["-c"]).starts_with("device net0: no sh"));
}

#[test]
fn given_options_that_are_no_passts_then_they_are_refused() {
    let Some(path) = passt() else { return };
    let bed = Bed::new("passt-options");
    let launcher = with_passt(&bed, &path);
    for bad in ["--pcap=/tmp/x", "log-file=/tmp/x", "tcp=1", ""] {
        match launcher.spawn_helper("net0", "passt", 1, vec![bad.into()]) {
            Err(LauncherError::Refused(why)) => {
                assert!(why.ends_with("not an option of passt"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
    // A port that is somebody else's.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let option = format!("tcp=127.0.0.1/{port}:80");
    let helper = launcher
        .spawn_helper("net0", "passt", 1, vec![option])
        .unwrap();
    let (_, _, outcome) = next_exit(&launcher);
    assert_eq!(outcome, ExitOutcome::Status(1));
    assert!(Frontend::connect(helper.vhost, Duration::from_secs(10)).is_err());
}

//! Who may call the API, and what: sockets and their directories, callers of other uids, and the
//! socket that only tells. As root.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::host::sh;
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::bad_input::{appears, expect};
use super::disk::LIMIT;

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("api-access");
    vec![
        test(
            "the API's directory and sockets are its owner's alone, and gone at the end, however it comes",
            places,
        ),
        test(
            "a directory that others may write to is refused with a remedy",
            unsafe_directories,
        ),
        test(
            "a caller who is not named is hung up on and told of by uid; those who are named are heard",
            callers,
        ),
        test(
            "the reading socket tells all there is and changes nothing",
            reading,
        ),
        test(
            "clients for whom there is no descriptor wait, are told of once, and are served when others have left",
            exhausted,
        ),
    ]
}

/// A `bulkhead serve` with both sockets in a directory that is not there yet.
struct Served {
    vmm: Vmm,
    directory: String,
    socket: String,
    reading: String,
}

impl Served {
    fn new(scratch: &Scratch, name: &str, more: &[&str]) -> Result<Self, String> {
        let directory = scratch.path(name);
        let (socket, reading) = (format!("{directory}/api"), format!("{directory}/read"));
        let sockets = ["--api-socket", &socket, "--api-read-only", &reading];
        Self::at(directory, sockets, more)
    }

    fn at(directory: String, sockets: [&str; 4], more: &[&str]) -> Result<Self, String> {
        let served = Self {
            vmm: Vmm::start(&[["serve"].as_slice(), &sockets, more].concat())?,
            directory,
            socket: sockets[1].to_owned(),
            reading: sockets[3].to_owned(),
        };
        appears(&served.socket)?;
        appears(&served.reading)?;
        Ok(served)
    }

    fn modes(&self) -> Result<[u32; 3], String> {
        let mode = |path: &String| {
            let there = std::fs::metadata(path).map_err(|e| format!("{path}: {e}"))?;
            check(there.uid() == 0, || format!("{path} is not root's"))?;
            Ok::<_, String>(there.mode() & 0o7777)
        };
        Ok([
            mode(&self.directory)?,
            mode(&self.socket)?,
            mode(&self.reading)?,
        ])
    }

    fn have_modes(&self, wanted: [u32; 3]) -> Verdict {
        let modes = self.modes()?;
        let octal = |modes: [u32; 3]| modes.map(|mode| format!("{mode:o}")).join(" ");
        check(modes == wanted, || {
            format!("{}, not {}", octal(modes), octal(wanted))
        })
    }

    /// One of whose directories lies in the other.
    fn nested(scratch: &Scratch) -> Result<Self, String> {
        let directory = scratch.path("outer");
        let (socket, reading) = (
            format!("{directory}/api"),
            format!("{directory}/inner/read"),
        );
        let sockets = ["--api-socket", &socket, "--api-read-only", &reading];
        Self::at(directory, sockets, &[])
    }

    fn gone(&self) -> Verdict {
        let end = Instant::now() + patience(LIMIT);
        while Path::new(&self.directory).exists() {
            check(Instant::now() < end, || {
                format!("{} is left behind", self.directory)
            })?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn places() -> Verdict {
    let scratch = Scratch::new("places")?;
    let mut ended = Served::new(&scratch, "ended", &[])?;
    ended.have_modes([0o700, 0o600, 0o600])?;
    sh(&format!("kill -TERM {}", ended.vmm.pid()))?;
    ended.vmm.ends_with(128 + 15, LIMIT)?;
    ended.gone()?;

    let mut killed = Served::new(&scratch, "killed", &[])?;
    killed.vmm.kill();
    killed.gone()?;

    // What somebody else has put there stays, and keeps the directory.
    let mut shared = Served::new(&scratch, "shared", &[])?;
    let file = format!("{}/file", shared.directory);
    std::fs::write(&file, "x").map_err(|e| e.to_string())?;
    sh(&format!("kill -TERM {}", shared.vmm.pid()))?;
    shared.vmm.ends_with(128 + 15, LIMIT)?;
    check(
        Path::new(&file).exists() && !Path::new(&shared.socket).exists(),
        || "the file is gone, or the socket is there".to_owned(),
    )?;

    let mut nested = Served::nested(&scratch)?;
    sh(&format!("kill -TERM {}", nested.vmm.pid()))?;
    nested.vmm.ends_with(128 + 15, LIMIT)?;
    nested.gone()?;
    // One directory is made for each, not two: what was made goes again.
    let deep = scratch.path("deep");
    let read = format!("{deep}/inner/further/read");
    let api = format!("{deep}/api");
    let refused = bulkhead(&["serve", "--api-socket", &api, "--api-read-only", &read])?;
    check(
        !refused.status.success() && !Path::new(&deep).exists(),
        || format!("{deep} is there"),
    )?;

    // As a power cut leaves them.
    let mut cut = Served::new(&scratch, "cut", &[])?;
    let launcher = ctl(&cut.socket, &["info"])?["launcher_pid"].clone();
    sh(&format!("kill -9 {launcher}"))?;
    cut.vmm.ends_with(5, LIMIT)?;
    cut.modes()?;
    let reaped = bulkhead(&["reap"])?;
    let text = String::from_utf8_lossy(&reaped.stdout).into_owned();
    for wanted in [
        format!("removed socket {}", cut.socket),
        format!("removed socket {}", cut.reading),
        format!("removed directory {}", cut.directory),
    ] {
        check(text.contains(&wanted), || format!("no {wanted:?}: {text}"))?;
    }
    cut.gone()?;
    nothing_left(Duration::from_secs(5))
}

fn unsafe_directories() -> Verdict {
    let scratch = Scratch::new("unsafe")?;
    let directory = scratch.path("open");
    std::fs::create_dir(&directory).map_err(|e| e.to_string())?;
    let socket = format!("{directory}/api");
    let refused = |words: &[&str]| {
        for option in ["--api-socket", "--api-read-only"] {
            let other = scratch.path("fine");
            let mut line = vec!["serve", option, &socket];
            if option == "--api-read-only" {
                line.extend(["--api-socket", &other]);
            }
            expect(&bulkhead(&line)?, 1, words)?;
            check(!Path::new(&other).exists(), || "a socket stays".to_owned())?;
        }
        Ok::<_, String>(())
    };
    for mode in [0o777, 0o775, 0o722] {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&directory, mode).map_err(|e| e.to_string())?;
        refused(&[&socket, "chmod go-w"])?;
    }
    sh(&format!("chmod 755 {directory}; chown 12345 {directory}"))?;
    refused(&[&socket, "uid 12345"])?;
    let kernel = guest_file("vmlinux");
    for (options, words) in [
        (vec!["--api-uid", "root"], vec!["--api-uid", "number"]),
        (vec!["--api-uid", "65534"], vec!["--api-uid", "65534"]),
        (vec!["--api-gid", "wheel"], vec!["--api-gid", "number"]),
        (vec!["--api-uid", "5"], vec!["--api-socket"]),
        (vec!["--api-read-uid", "5"], vec!["--api-read-only"]),
    ] {
        let line = [["run", "--kernel", &kernel].as_slice(), &options].concat();
        expect(&bulkhead(&line)?, 2, &words).map_err(|e| format!("{options:?}: {e}"))?;
    }
    Ok(())
}

/// Of one whom no file's mode stops, and the kernel still says who it is.
const BY_FORCE: [&str; 2] = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"];

/// `ctl` as another user, who may run the program.
fn as_user(
    scratch: &Scratch,
    by: &[&str],
    ids: (u32, u32),
    socket: &str,
    command: &str,
) -> Result<Output, String> {
    let program = scratch.path("bulkhead");
    if !Path::new(&program).exists() {
        std::fs::copy(bin("bulkhead"), &program).map_err(|e| format!("{program}: {e}"))?;
    }
    Command::new("setpriv")
        .arg(format!("--reuid={}", ids.0))
        .arg(format!("--regid={}", ids.1))
        .args(by)
        .args([
            "--clear-groups",
            &program,
            "ctl",
            "--socket",
            socket,
            command,
        ])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("setpriv: {e}"))
}

fn callers() -> Verdict {
    let scratch = Scratch::new("callers")?;
    // Nobody is named: the directory and the sockets' modes keep everybody else out.
    let own = Served::new(&scratch, "own", &[])?;
    let output = as_user(&scratch, &[], (12345, 12345), &own.socket, "info")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    check(
        !output.status.success() && errors.contains("no permission to connect"),
        || format!("{}: {errors}", output.status),
    )?;
    for socket in [&own.socket, &own.reading] {
        let output = as_user(&scratch, &BY_FORCE, (12345, 12345), socket, "info")?;
        check(!output.status.success(), || format!("{output:?}"))?;
    }
    let log = own.vmm.errors();
    check(
        log.contains("of uid 12345 and gid 12345 was hung up on"),
        || log.clone(),
    )?;
    drop(own);

    let ids = [
        "--api-uid",
        "12345",
        "--api-gid",
        "777",
        "--api-read-uid",
        "23456",
    ];
    let served = Served::new(&scratch, "named", &ids)?;
    served.have_modes([0o711, 0o666, 0o666])?;
    let (socket, reading) = (&served.socket, &served.reading);
    for (ids, socket, heard) in [
        ((12345, 5), socket, true),
        ((12345, 5), reading, true),
        ((5, 777), socket, true),
        ((5, 777), reading, true),
        ((23456, 5), reading, true),
        ((23456, 5), socket, false),
        ((12346, 12345), socket, false),
        ((777, 5), reading, false),
    ] {
        let output = as_user(&scratch, &[], ids, socket, "info")?;
        check(output.status.success() == heard, || {
            format!("{ids:?} at {socket}: {output:?}")
        })?;
    }
    let events = bulkhead(&["ctl", "--socket", socket, "events"])?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    let log = served.vmm.errors();
    for told in [
        "of uid 23456 and gid 5 was hung up on at the API socket: --api-uid 23456",
        "of uid 12346 and gid 12345 was hung up on at the API socket: --api-uid 12346",
        "of uid 777 and gid 5 was hung up on at the reading API socket: --api-read-uid 777",
    ] {
        check(events.contains(told) && log.contains(told), || {
            format!("no {told:?} in\n{events}\n{log}")
        })?;
    }
    check(events.matches("api.refused").count() == 3, || {
        events.clone()
    })
}

/// Gives a VMM a table of descriptors with room for a few more than it has.
fn fill(pid: u32) -> Verdict {
    let fds = format!("/proc/{pid}/fd");
    let highest = std::fs::read_dir(&fds)
        .map_err(|e| format!("{fds}: {e}"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .unwrap_or(2);
    // As its own user: a root without CAP_SYS_RESOURCE may not.
    let room = highest + 4;
    let id = |name: &str| format!("$(awk '/^{name}:/ {{print $2}}' /proc/{pid}/status)");
    sh(&format!(
        "setpriv --reuid={} --regid={} --clear-groups prlimit --pid {pid} --nofile={room}:",
        id("Uid"),
        id("Gid")
    ))
    .map(drop)
}

fn exhausted() -> Verdict {
    let scratch = Scratch::new("exhausted")?;
    let served = Served::new(&scratch, "api", &[])?;
    ctl(&served.socket, &["info"])?;
    fill(served.vmm.pid())?;
    // Fewer than the API's own bound of 64.
    let connect = |_| UnixStream::connect(&served.socket).map_err(|e| e.to_string());
    let others = (0..50).map(connect).collect::<Result<Vec<_>, _>>()?;
    let told = "cannot accept a client: Too many open files";
    let end = Instant::now() + patience(LIMIT);
    while !served.vmm.errors().contains(told) {
        check(Instant::now() < end, || "no client was too many".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let asked = served.socket.clone();
    let late = std::thread::spawn(move || ctl(&asked, &["info"]));
    // Time for several attempts.
    std::thread::sleep(Duration::from_secs(2));
    check(!late.is_finished(), || "there was room for one more".into())?;
    drop(others);
    late.join().map_err(|_| "ctl panicked")??;
    ctl(&served.socket, &["info"])?;
    let log = served.vmm.errors();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(told)).collect();
    check(lines.len() == 1 && lines[0].contains("`ulimit -n`"), || {
        log.clone()
    })
}

fn reading() -> Verdict {
    let scratch = Scratch::new("reading")?;
    let served = Served::new(&scratch, "api", &[])?;
    let (socket, reading) = (&served.socket, &served.reading);
    let kernel = guest_file("vmlinux");
    let create = [
        "create", "--kernel", &kernel, "--memory", "128M", "--serial", "none", "--rng",
    ];
    ctl(socket, &create)?;
    // The same is told at both.
    for told in [vec!["info"], vec!["devices"], vec!["stats", "rng0"]] {
        let value = ctl(reading, &told)?;
        check(value.to_string().len() > 2, || format!("{told:?}: {value}"))?;
    }
    let events = bulkhead(&["ctl", "--socket", reading, "events"])?;
    let text = String::from_utf8_lossy(&events.stdout).into_owned();
    check(text.contains("machine.created"), || text.clone())?;
    for (command, method) in [
        (vec!["boot"], "Boot"),
        (vec!["pause"], "Pause"),
        (vec!["shutdown", "--force"], "Shutdown"),
        (vec!["remove-device", "rng0"], "RemoveDevice"),
        (vec!["add-rng", "id=more"], "AddDevice"),
        (vec!["resize-cpus", "2"], "ResizeCpus"),
    ] {
        let line = ctl(reading, &command).err().unwrap_or_default();
        check(
            line.contains(&format!("{method} is not for this socket"))
                && line.contains("--api-socket"),
            || format!("{command:?}: {line}"),
        )?;
    }
    let state = ctl(socket, &["info"])?["state"].clone();
    check(state == "created", || state.to_string())?;
    let devices = ctl(reading, &["devices"])?.to_string();
    check(
        devices.contains("\"rng0\"") && !devices.contains("\"more\""),
        || devices.clone(),
    )
}

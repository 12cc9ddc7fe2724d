//! What a careless operator types: one line that names the thing, exit code 1 (2 for
//! usage), nothing left behind.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Output};
use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, bin, bulkhead, ctl, guest_file, nothing_left};

/// Those that need a KVM that can run guests, or to be inside the nested host.
pub fn tests() -> Vec<Test> {
    let test = Test::short("bad-input");
    let mut tests = native();
    tests.push(test(
        "an ordinary user with /dev/kvm boots a guest with a disk",
        ordinary_user,
    ));
    tests.push(test("no /dev/kvm is said so", no_dev_kvm));
    tests.push(test(
        "no right to make namespaces is said so",
        no_namespaces,
    ));
    tests
}

/// Those that need no guest.
pub fn native() -> Vec<Test> {
    let test = Test::short("bad-input");
    vec![
        test("files that are no kernel", bad_kernels),
        test("files that are no initrd", bad_initrds),
        test("disks that are none", bad_disks),
        test("options that are wrong", bad_options),
        test("more memory or CPUs than the host has", too_much_memory),
        test("a serial file and sockets in the wrong place", bad_places),
        test(
            "a path that --allow-path does not name is refused, ids come out of --uid-range",
            ranges,
        ),
        test("help and version go to standard output", help),
    ]
}

fn ranges() -> Verdict {
    let scratch = Scratch::new("ranges")?;
    let (inside, kernel) = (scratch.path("inside"), guest_file("vmlinux"));
    std::fs::create_dir(&inside).map_err(|e| e.to_string())?;
    let disk = scratch.disk("outside", 1 << 20, 1)?;
    let disk = format!("path={disk}");
    let line = [
        "--kernel",
        &kernel,
        "--disk",
        &disk,
        "--allow-path",
        &inside,
        "--allow-path",
        &kernel,
    ];
    run(&line, 1, &["outside", "--allow-path"])?;
    run(
        &["--kernel", &kernel, "--allow-path", "/no/such/place"],
        1,
        &["/no/such/place"],
    )?;
    for wrong in ["0:64", "1000:1", "1000", "2000000000:64"] {
        let line = ["--kernel", &kernel, "--uid-range", wrong];
        run(&line, 2, &["--uid-range"])?;
    }
    // Two VMs have all of a range; a third has no place in it.
    let serve = |name: &str| {
        let socket = scratch.path(name);
        let child = Command::new(bin("bulkhead"))
            .args(["serve", "--api-socket", &socket])
            .args(["--uid-range", "200000:128"])
            .spawn()
            .map_err(|e| e.to_string())?;
        Ok::<_, String>((socket, child))
    };
    let mut vms = [serve("one")?, serve("two")?];
    let verdict = (|| -> Verdict {
        let mut ids = Vec::new();
        for (socket, _) in &vms {
            appears(socket)?;
            let create = ["create", "--kernel", &kernel, "--memory", "128M"];
            let shared = format!("{disk},readonly=on");
            let more = ["--serial", "none", "--disk", &shared];
            ctl(socket, &[create.as_slice(), more.as_slice()].concat())?;
            let devices = ctl(socket, &["devices"])?;
            let pid = devices
                .pointer("/devices/0/pid")
                .or(devices.pointer("/0/pid"));
            let pid = pid.and_then(serde_json::Value::as_i64).unwrap_or(0);
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
                .map_err(|e| format!("{devices}: {e}"))?;
            for key in ["Uid:", "Gid:"] {
                let line = status.lines().find_map(|l| l.strip_prefix(key));
                ids.push(line.unwrap_or_default().trim().replace('\t', " "));
            }
        }
        let mut wanted: Vec<String> = ["200000", "200000", "200064", "200064"]
            .map(|id| [id; 4].join(" "))
            .into();
        ids.sort();
        wanted.sort();
        check(ids == wanted, || format!("{ids:?}, not {wanted:?}"))?;
        let third = bulkhead(&[
            "serve",
            "--api-socket",
            &scratch.path("three"),
            "--uid-range",
            "200000:128",
        ])?;
        let errors = String::from_utf8_lossy(&third.stderr).into_owned();
        check(
            third.status.code() == Some(1) && errors.contains("its 2 blocks"),
            || errors,
        )
    })();
    for (socket, child) in &mut vms {
        if ctl(socket, &["shutdown", "--force"]).is_err() {
            // It has no machine.
            let _ = child.kill();
        }
        let _ = child.wait();
    }
    verdict?;
    nothing_left(Duration::from_secs(5))
}

/// Waits for a socket whose VMM answers.
pub fn appears(socket: &str) -> Verdict {
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    while ctl(socket, &["info"]).is_err() {
        check(std::time::Instant::now() < limit, || {
            format!("{socket} does not answer")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// One line, the exit code, the words, and nothing left.
pub fn expect(output: &Output, code: i32, words: &[&str]) -> Verdict {
    let errors = String::from_utf8_lossy(&output.stderr);
    check(output.status.code() == Some(code), || {
        format!("{}: {errors}", output.status)
    })?;
    check(errors.lines().count() == 1, || {
        format!("not one line: {errors}")
    })?;
    for word in words {
        check(errors.contains(word), || {
            format!("no {word:?} in: {errors}")
        })?;
    }
    nothing_left(Duration::from_secs(5))
}

fn run(args: &[&str], code: i32, words: &[&str]) -> Verdict {
    let mut all = vec!["run", "--serial", "none"];
    all.extend_from_slice(args);
    expect(&bulkhead(&all)?, code, words).map_err(|e| format!("{args:?}: {e}"))
}

fn kernel_bytes(name: &str) -> Result<Vec<u8>, String> {
    let path = guest_file(name);
    std::fs::read(&path).map_err(|e| format!("{path}: {e}"))
}

fn bad_kernels() -> Verdict {
    let scratch = Scratch::new("kernels")?;
    let (elf, bz) = (kernel_bytes("vmlinux")?, kernel_bytes("vmlinuz")?);
    run(
        &["--kernel", "/no/such/kernel"],
        1,
        &["/no/such/kernel", "kernel"],
    )?;
    let directory = scratch.path("");
    run(&["--kernel", &directory], 1, &["directory"])?;
    let files: [(&str, &[u8]); 6] = [
        ("empty", &[]),
        (
            "text",
            b"this is no kernel, but it is longer than nothing\n",
        ),
        ("elf-header", elf.get(..64).unwrap_or_default()),
        ("elf-half", elf.get(..elf.len() / 2).unwrap_or_default()),
        ("bz-header", bz.get(..1024).unwrap_or_default()),
        ("bz-half", bz.get(..bz.len() / 2).unwrap_or_default()),
    ];
    for (name, content) in files {
        let path = scratch.file(name, content)?;
        run(&["--kernel", &path], 1, &[&path])?;
    }
    let binary = bin("bulkhead").to_string_lossy().into_owned();
    run(&["--kernel", &binary], 1, &[&binary])
}

fn bad_initrds() -> Verdict {
    let scratch = Scratch::new("initrds")?;
    let kernel = guest_file("vmlinux");
    run(
        &["--kernel", &kernel, "--initrd", "/no/such"],
        1,
        &["/no/such", "initrd"],
    )?;
    let empty = scratch.file("empty", &[])?;
    run(&["--kernel", &kernel, "--initrd", &empty], 1, &[&empty])?;
    let big = scratch.disk("big", 80 << 20, 3)?;
    run(
        &["--kernel", &kernel, "--initrd", &big, "--memory", "128M"],
        1,
        &[&big],
    )
}

fn bad_disks() -> Verdict {
    let scratch = Scratch::new("disks")?;
    let kernel = guest_file("vmlinux");
    let disk = |spec: &str, words: &[&str]| {
        run(
            &["--kernel", &kernel, "--memory", "128M", "--disk", spec],
            1,
            words,
        )
    };
    disk("path=/no/such/disk", &["/no/such/disk"])?;
    disk(&format!("path={}", scratch.path("")), &["directory"])?;
    let short = scratch.file("short", &[0; 511])?;
    disk(&format!("path={short}"), &[&short, "512"])?;
    let empty = scratch.file("empty", &[])?;
    disk(&format!("path={empty}"), &[&empty])?;
    disk("path=/dev/null", &["/dev/null"])?;
    let good = scratch.disk("good", 4096, 5)?;
    let immutable = Command::new("mount")
        .args(["--bind", "-o", "ro", &good, &good])
        .status()
        .is_ok_and(|s| s.success())
        && Command::new("mount")
            .args(["-o", "remount,ro,bind", &good])
            .status()
            .is_ok_and(|s| s.success());
    if immutable {
        let verdict = disk(&format!("path={good}"), &[&good, "readonly=on"]);
        let _ = Command::new("umount").arg(&good).status();
        verdict?;
    }
    Ok(())
}

fn bad_options() -> Verdict {
    let kernel = guest_file("vmlinux");
    for (args, words) in [
        (vec!["run"], vec!["--kernel"]),
        (
            vec!["run", "--kernel", &kernel, "--frobnicate"],
            vec!["--frobnicate"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--memory", "lots"],
            vec!["--memory", "512M"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--memory", "0"],
            vec!["--memory"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--cpus", "0"],
            vec!["--cpus"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--cpus", "2,pin=0"],
            vec!["--cpus", "pin"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--disk", "/x"],
            vec!["--disk", "path="],
        ),
        (
            vec!["run", "--kernel", &kernel, "--disk", "path=/x,format=vdi"],
            vec!["format"],
        ),
        (
            vec![
                "run",
                "--kernel",
                &kernel,
                "--disk",
                "path=/x,id=a",
                "--disk",
                "path=/y,id=a",
            ],
            vec!["id"],
        ),
        (
            vec!["run", "--kernel", &kernel, "--serial", "tty"],
            vec!["--serial"],
        ),
        (vec!["frobnicate"], vec!["frobnicate"]),
        (vec![], vec!["command"]),
        (vec!["serve"], vec!["--api-socket"]),
    ] {
        expect(&bulkhead(&args)?, 2, &words).map_err(|e| format!("{args:?}: {e}"))?;
    }
    // Its own help is the one that is named, whatever stands beside it.
    let mut command = Command::new(bin("bulkhead"));
    command.args(["ctl", "resize-cpus", "many"]);
    command.arg(OsStr::from_bytes(b"\xff"));
    let output = command.output().map_err(|e| e.to_string())?;
    expect(&output, 2, &["bulkhead ctl resize-cpus --help"])?;
    let socket = "/no/such/socket";
    expect(
        &bulkhead(&["ctl", "--socket", socket, "info"])?,
        1,
        &[socket],
    )?;
    expect(&bulkhead(&["audit", "--api-socket", socket])?, 1, &[socket])?;
    expect(
        &bulkhead(&["audit", "--pid", "999999999"])?,
        1,
        &["999999999"],
    )
}

fn too_much_memory() -> Verdict {
    let kernel = guest_file("vmlinux");
    run(
        &[
            "--kernel",
            &kernel,
            "--memory",
            "128M",
            "--cpus",
            "1,pin=999",
        ],
        1,
        &["999"],
    )?;
    run(
        &["--kernel", &kernel, "--memory", "64T"],
        1,
        &["memory", "host"],
    )?;
    run(&["--kernel", &kernel, "--memory", "1M"], 1, &["memory"])?;
    run(
        &["--kernel", &kernel, "--memory", "100000001"],
        1,
        &["memory"],
    )
}

fn bad_places() -> Verdict {
    let kernel = guest_file("vmlinux");
    let mut all = vec!["run", "--kernel", &kernel, "--memory", "128M"];
    all.extend_from_slice(&["--serial", "file=/no/such/dir/console"]);
    expect(&bulkhead(&all)?, 1, &["/no/such/dir/console"])?;
    expect(
        &bulkhead(&["serve", "--api-socket", "/no/such/dir/api"])?,
        1,
        &["/no/such/dir/api"],
    )?;
    let long = format!("/tmp/{}", "x".repeat(120));
    expect(
        &bulkhead(&["serve", "--api-socket", &long])?,
        1,
        &["too long"],
    )?;
    expect(
        &bulkhead(&[
            "serve",
            "--api-socket",
            "/tmp/x",
            "--libexec",
            "/no/such/libexec",
        ])?,
        1,
        &["/no/such/libexec"],
    )
}

fn help() -> Verdict {
    for args in [
        vec!["--help"],
        vec!["run", "--help"],
        vec!["serve", "--help"],
        vec!["ctl", "--help"],
        vec!["audit", "--help"],
        vec!["--version"],
    ] {
        let output = bulkhead(&args)?;
        check(output.status.success() && !output.stdout.is_empty(), || {
            format!("{args:?}: {output:?}")
        })?;
        check(output.stderr.is_empty(), || format!("{args:?}: {output:?}"))?;
    }
    Ok(())
}

/// A copy of the binaries that an ordinary user may read, run as that user.
fn as_nobody(scratch: &Scratch, before: &str) -> Result<Output, String> {
    let directory = scratch.path("");
    for name in ["bulkhead", "bulkhead-launcher", "bulkhead-blk"] {
        std::fs::copy(bin(name), scratch.path(name)).map_err(|e| format!("{name}: {e}"))?;
    }
    for name in ["vmlinux", "initrd.img"] {
        std::fs::copy(guest_file(name), scratch.path(name)).map_err(|e| format!("{name}: {e}"))?;
    }
    let script = scratch.script("s", "echo SUM=$(sha256sum < /dev/vda)")?;
    let shell = format!(
        "chown -R nobody {directory}; chmod 755 {directory}; chmod 666 /dev/kvm; {before}
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \
{directory}/bulkhead run --kernel {directory}/vmlinux --initrd {directory}/initrd.img --memory 256M \
--cmdline 'console=ttyS0 quiet panic=-1 bh.cmd=script' --disk path={directory}/disk --disk path={script},readonly=on"
    );
    Command::new("sh")
        .args(["-c", &shell])
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|e| e.to_string())
}

fn ordinary_user() -> Verdict {
    let scratch = Scratch::new("user")?;
    let disk = scratch.disk("disk", 1 << 20, 29)?;
    let expected = crate::block::sha256(&disk)?;
    let output = as_nobody(&scratch, "true")?;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    check(
        output.status.code() == Some(0) && out.contains(&format!("SUM={expected}")),
        || format!("{}\n{out}\n{err}", output.status),
    )?;
    nothing_left(Duration::from_secs(5))
}

fn no_dev_kvm() -> Verdict {
    let kernel = guest_file("vmlinux");
    let shell = format!(
        "mount -t tmpfs none /dev && exec {} run --serial none --kernel {kernel}",
        bin("bulkhead").display()
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &shell])
        .output()
        .map_err(|e| e.to_string())?;
    expect(&output, 1, &["/dev/kvm"])
}

fn no_namespaces() -> Verdict {
    let scratch = Scratch::new("nons")?;
    scratch.disk("disk", 1 << 20, 31)?;
    let knob = "/proc/sys/user/max_user_namespaces";
    let before = std::fs::read_to_string(knob).map_err(|e| format!("{knob}: {e}"))?;
    std::fs::write(knob, "0").map_err(|e| format!("{knob}: {e}"))?;
    let output = as_nobody(&scratch, "true");
    std::fs::write(knob, before.trim()).map_err(|e| format!("{knob}: {e}"))?;
    expect(&output?, 1, &["namespace", "max_user_namespaces"])
}

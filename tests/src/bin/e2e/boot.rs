//! Kernels boot, by both protocols, and end with the exit code that says how.

use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, guest_file, nothing_left};

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = Test::short("boot");
    let long = Test::long("boot");
    vec![
        test(
            "a PVH kernel boots and powers off: exit code 0",
            pvh_poweroff,
        ),
        test("a bzImage boots and reboots: exit code 3", bzimage_reboot),
        test("a panic resets: exit code 3", panic_resets),
        test("a triple fault: exit code 4", triple_fault),
        test("two vCPUs are both online", two_cpus),
        test(
            "memory on both sides of the 32-bit hole is there",
            memory_hole,
        ),
        test("the serial port goes to a file", serial_file),
        test(
            "the serial port goes both ways over a unix socket",
            serial_socket,
        ),
        test("the serial port takes what is typed", serial_input),
        test(
            "on a terminal the console works and the terminal is put back",
            terminal,
        ),
        test(
            "a serial file on a full disk is said so, the guest runs on",
            serial_full,
        ),
        long("Debian 6.1 cloud boots by both protocols", || {
            both("-6.1-cloud")
        }),
        long("Debian 6.1 generic boots by both protocols", || {
            both("-6.1-generic")
        }),
        long("Debian 6.12 generic boots by both protocols", || {
            both("-6.12-generic")
        }),
    ]
}

fn pvh_poweroff() -> Verdict {
    let mut vmm = Vmm::boot("bh.cmd=poweroff", &[])?;
    vmm.wait_for("BULKHEAD-GUEST-INIT", LIMIT)?;
    vmm.ends_with(0, LIMIT)?;
    check(vmm.errors().is_empty(), || vmm.story("it complained"))?;
    nothing_left(Duration::from_secs(5))
}

fn bzimage_reboot() -> Verdict {
    let (kernel, initrd) = (guest_file("vmlinuz"), guest_file("initrd.img"));
    let mut vmm = Vmm::start(&[
        "run",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--memory",
        "256M",
        "--cmdline",
        "console=ttyS0 quiet bh.cmd=reboot",
    ])?;
    vmm.wait_for("BULKHEAD-GUEST-INIT", LIMIT)?;
    vmm.ends_with(3, LIMIT)
}

fn panic_resets() -> Verdict {
    let mut vmm = Vmm::boot("bh.cmd=panic", &[])?;
    vmm.wait_for("Kernel panic", LIMIT)?;
    vmm.ends_with(3, LIMIT)
}

fn triple_fault() -> Verdict {
    let mut vmm = Vmm::boot("bh.cmd=triplefault reboot=t", &[])?;
    vmm.wait_for("BULKHEAD-GUEST-INIT", LIMIT)?;
    vmm.ends_with(4, LIMIT)?;
    check(vmm.errors().contains("triple-faulted"), || {
        vmm.story("it does not say so")
    })
}

fn two_cpus() -> Verdict {
    let scratch = Scratch::new("cpus")?;
    let script = scratch.script("s", "echo ONLINE=$(cat /sys/devices/system/cpu/online)")?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot("bh.cmd=script", &["--cpus", "2,pin=0:0", "--disk", &disk])?;
    vmm.wait_for("ONLINE=0-1", LIMIT)?;
    let threads: Vec<String> = std::fs::read_dir(format!("/proc/{}/task", vmm.pid()))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok())
        .map(|c| c.trim().to_string())
        .collect();
    // The guest may have ended already; then there is nothing left to look at.
    check(
        threads.is_empty()
            || ["vp-0", "vp-1"]
                .iter()
                .all(|n| threads.iter().any(|t| t == n)),
        || format!("threads: {threads:?}"),
    )?;
    vmm.ends_with(0, LIMIT)
}

fn memory_hole() -> Verdict {
    let scratch = Scratch::new("hole")?;
    // 3 GiB below the hole, 512 MiB above: use some of the high part.
    let script = scratch.script(
        "s",
        "grep -i 'system ram' /proc/iomem; mount -t tmpfs -o size=3300m t /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs -o size=3300m t /mnt
free -m | sed -n 2p; grep MemTotal /proc/meminfo",
    )?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot("bh.cmd=script", &["--memory", "3584M", "--disk", &disk])?;
    vmm.wait_for("BULKHEAD-GUEST-EXIT", LIMIT)?;
    let output = vmm.output();
    check(output.contains("100000000-11fffffff : System RAM"), || {
        vmm.story("no RAM from 4 GiB on")
    })?;
    vmm.ends_with(0, LIMIT)
}

fn serial_file() -> Verdict {
    let scratch = Scratch::new("serial")?;
    let path = scratch.path("console");
    let mut vmm = Vmm::boot("bh.cmd=poweroff", &["--serial", &format!("file={path}")])?;
    vmm.ends_with(0, LIMIT)?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    check(text.contains("BULKHEAD-GUEST-INIT"), || {
        format!("the file holds {text:?}")
    })?;
    check(vmm.output().is_empty(), || {
        vmm.story("the console came out twice")
    })
}

fn serial_socket() -> Verdict {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let scratch = Scratch::new("sersock")?;
    let path = scratch.path("console");
    let script = scratch.script("s", "echo TYPE; read -r line; echo \"GOT=$line\"")?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot(
        "bh.cmd=script",
        &["--serial", &format!("socket={path}"), "--disk", &disk],
    )?;
    let end = std::time::Instant::now() + LIMIT;
    let mut stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(e) if std::time::Instant::now() > end => {
                return Err(vmm.story(&format!("{path}: {e}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream
        .set_read_timeout(Some(LIMIT))
        .map_err(|e| e.to_string())?;
    let (mut text, mut buffer, mut typed) = (String::new(), [0; 512], false);
    while !text.contains("GOT=") || !text.ends_with('\n') {
        match stream.read(&mut buffer) {
            Ok(n @ 1..) => text.push_str(&String::from_utf8_lossy(&buffer[..n])),
            other => return Err(format!("{other:?} after {text:?}")),
        }
        if !typed && text.contains("TYPE") {
            stream
                .write_all(b"over the socket\n")
                .map_err(|e| e.to_string())?;
            typed = true;
        }
    }
    check(text.contains("GOT=over the socket"), || format!("{text:?}"))?;
    vmm.ends_with(0, LIMIT)?;
    check(!std::path::Path::new(&path).exists(), || {
        format!("{path} is left behind")
    })
}

fn serial_input() -> Verdict {
    let scratch = Scratch::new("typed")?;
    let script = scratch.script("s", "echo TYPE; read -r line; echo \"GOT=$line\"")?;
    let disk = format!("path={script},readonly=on");
    let mut vmm = Vmm::boot("bh.cmd=script", &["--disk", &disk])?;
    vmm.wait_for("TYPE", LIMIT)?;
    vmm.type_text("by hand\n")?;
    vmm.wait_for("GOT=by hand", LIMIT)?;
    vmm.ends_with(0, LIMIT)
}

fn both(variant: &str) -> Verdict {
    let initrd = guest_file(&format!("initrd{variant}.img"));
    for kernel in ["vmlinux", "vmlinuz"] {
        let kernel = guest_file(&format!("{kernel}{variant}"));
        let mut vmm = Vmm::start(&[
            "run",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--memory",
            "512M",
            "--cmdline",
            "console=ttyS0 quiet panic=-1 bh.cmd=poweroff",
        ])?;
        vmm.wait_for("BULKHEAD-GUEST-INIT", LIMIT)?;
        vmm.ends_with(0, LIMIT)?;
    }
    Ok(())
}

fn terminal() -> Verdict {
    let scratch = Scratch::new("tty")?;
    let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initrd.img"));
    let (before, during, after) = (scratch.path("a"), scratch.path("b"), scratch.path("c"));
    let inner = format!(
        "stty -a > {before}; (for i in $(seq 300); do stty -a < /dev/tty > {during}; \
         grep -q -e -icanon {during} && break; sleep 0.1; done) & \
         {} run --kernel {kernel} --initrd {initrd} --memory 256M \
         --cmdline 'console=ttyS0 quiet panic=-1 bh.cmd=poweroff'; code=$?; \
         wait; stty -a > {after}; exit $code",
        bulkhead_tests::vmm::bin("bulkhead").display()
    );
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &inner, "/dev/null"]);
    let mut script = Vmm::spawn(command)?;
    script.wait_for("BULKHEAD-GUEST-INIT", LIMIT)?;
    script.ends_with(0, LIMIT)?;
    let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
    check(read(&during)?.contains("-icanon"), || {
        "the terminal was never raw".to_string()
    })?;
    check(read(&before)? == read(&after)?, || {
        "the terminal is not what it was".to_string()
    })
}

fn serial_full() -> Verdict {
    let mut vmm = Vmm::boot("bh.cmd=poweroff", &["--serial", "file=/dev/full"])?;
    vmm.ends_with(0, LIMIT)?;
    let errors = vmm.errors();
    check(
        errors.contains("No space left") && errors.lines().count() == 1,
        || vmm.story("it does not say so in one line"),
    )
}

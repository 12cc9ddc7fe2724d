//! Processes die: what is left, who notices, what goes on.

use std::time::Duration;

use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, nothing_left};

const LIMIT: Duration = Duration::from_secs(90);

/// The tests of this subject.
pub fn tests() -> Vec<Test> {
    let test = |name, run| Test {
        subject: "death",
        name,
        long: false,
        run,
    };
    vec![
        test("a killed VMM leaves no process and no socket", vmm_killed),
        test(
            "a killed launcher ends the VM with exit code 5",
            launcher_killed,
        ),
        test(
            "a killed disk process is replaced, and the guest reads on from both disks",
            disk_killed,
        ),
        test("SIGINT and SIGTERM end the VM and all of it", signals),
    ]
}

struct Running {
    vmm: Vmm,
    socket: String,
    _scratch: Scratch,
}

fn running(name: &str, disks: usize) -> Result<Running, String> {
    let scratch = Scratch::new(name)?;
    let socket = scratch.path("api");
    let mut args = vec!["--api-socket".to_string(), socket.clone()];
    for n in 0..disks {
        let disk = scratch.disk(&format!("disk{n}"), 1 << 20, n as u64 + 1)?;
        args.extend(["--disk".to_string(), format!("path={disk},id=d{n}")]);
    }
    let script = scratch.script(
        "s",
        "echo UP; while read -r line; do dd if=/dev/vdb of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null && echo READ-OK; done",
    )?;
    args.extend([
        "--disk".to_string(),
        format!("path={script},readonly=on,id=script"),
    ]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut vmm = Vmm::boot("bh.cmd=script", &args)?;
    vmm.wait_for("UP", LIMIT)?;
    Ok(Running {
        vmm,
        socket,
        _scratch: scratch,
    })
}

fn kill(pid: i64) -> Verdict {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .map_err(|e| e.to_string())?;
    check(status.success(), || format!("kill -9 {pid}: {status}"))
}

fn pid_of(socket: &str, device: &str) -> Result<i64, String> {
    let devices = ctl(socket, &["devices"])?;
    devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["id"] == device)
        .and_then(|d| d["pid"].as_i64())
        .ok_or_else(|| format!("no {device} in {devices}"))
}

fn vmm_killed() -> Verdict {
    let mut r = running("vmmkill", 2)?;
    r.vmm.kill();
    nothing_left(Duration::from_secs(5))?;
    check(!std::path::Path::new(&r.socket).exists(), || {
        format!("{} is left behind", r.socket)
    })
}

fn launcher_killed() -> Verdict {
    let mut r = running("lkill", 2)?;
    let info = ctl(&r.socket, &["info"])?;
    kill(
        info["launcher_pid"]
            .as_i64()
            .ok_or_else(|| info.to_string())?,
    )?;
    r.vmm.ends_with(5, LIMIT)?;
    let errors = r.vmm.errors();
    check(errors.contains("launcher"), || {
        r.vmm.story("it does not say why")
    })?;
    nothing_left(Duration::from_secs(5))
}

fn disk_killed() -> Verdict {
    let mut r = running("dkill", 2)?;
    for disk in ["d0", "d1"] {
        kill(pid_of(&r.socket, disk)?)?;
        let end = std::time::Instant::now() + LIMIT;
        loop {
            let devices = ctl(&r.socket, &["devices"])?;
            let serves = devices
                .as_array()
                .into_iter()
                .flatten()
                .any(|d| d["id"] == disk && d["incarnation"] == 2 && d["state"] == "running");
            if serves {
                break;
            }
            check(std::time::Instant::now() < end, || devices.to_string())?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // It reads vdb, which is d1.
    r.vmm.type_text("\n")?;
    r.vmm.wait_for("READ-OK", LIMIT)?;
    ctl(&r.socket, &["shutdown", "--force"])?;
    r.vmm.ends_with(0, LIMIT)?;
    nothing_left(Duration::from_secs(5))
}

fn signals() -> Verdict {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut r = running("sig", 1)?;
        let status = std::process::Command::new("kill")
            .args([format!("-{signal}"), r.vmm.pid().to_string()])
            .status()
            .map_err(|e| e.to_string())?;
        check(status.success(), || format!("kill: {status}"))?;
        r.vmm.ends_with(code, LIMIT)?;
        nothing_left(Duration::from_secs(5))?;
        check(!std::path::Path::new(&r.socket).exists(), || {
            format!("{} is left", r.socket)
        })?;
    }
    Ok(())
}

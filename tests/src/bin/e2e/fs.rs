//! Directories of the host's in a guest, each by a virtiofsd that the launcher starts: files both ways
//! with whom they belong to, nothing above the directory, directories that come and go, and a virtiofsd
//! that is killed.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::host::{AS_USER, Undo, for_user, sh};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, bin, bulkhead, ctl, guest_file, nothing_left, patience};

use super::disk::LIMIT;
use super::hotplug::device;
use super::net_modes::tool;
use super::rng::{audited, kill_process, refused};
use super::shell::{Shell, guest};

/// Those that need a guest.
pub fn tests() -> Vec<Test> {
    let test = Test::short("fs");
    vec![
        test(
            "a guest writes and reads the host's files as their owners, reaches nothing above its directory, and goes on when its virtiofsd is killed",
            in_a_guest,
        ),
        test(
            "an ordinary user's guest has that user's files as root's",
            as_a_user,
        ),
    ]
}

/// Those that need none.
pub fn native() -> Vec<Test> {
    vec![Test::short("fs")(
        "directories are made, limited, added and removed; wrong ones are refused; a virtiofsd that dies is replaced",
        without_a_guest,
    )]
}

/// Files of the host's: a directory to serve, what lies beside it, and links that lead out.
fn tree(scratch: &Scratch) -> Result<String, String> {
    let share = scratch.path("share");
    sh(&format!(
        "mkdir -p {share}/dir; echo SECRET >{secret}; chmod 644 {secret}
ln -s {secret} {share}/absolute; ln -s ../secret {share}/relative; ln -s /etc/passwd {share}/etc; ln -s / {share}/root
mkdir -p {share}/a/b; echo below >{share}/a/b/file
head -c 16M /dev/urandom >{share}/big; chown 1234:4321 {share}/big; chmod 640 {share}/big
umask 022; echo old >{share}/old",
        secret = scratch.path("secret"),
    ))?;
    Ok(share)
}

fn sum(path: &str) -> Result<String, String> {
    let sum = sh(&format!("sha256sum <{path} | cut -d' ' -f1"))?;
    Ok(sum.trim().to_owned())
}

/// What `stat` says of a file of the host's.
fn facts(path: &str, wanted: &str) -> Verdict {
    let is = sh(&format!("stat -c '%u:%g %a %F' {path}"))?;
    check(is.trim() == wanted, || {
        format!("{path} is {is}, not {wanted}")
    })
}

/// Mounts by the tag.
fn mount(guest: &mut Shell, tag: &str) -> Verdict {
    guest.run(&format!(
        "mkdir -p /tmp/{tag}; until mount -t virtiofs {tag} /tmp/{tag} 2>/tmp/why; do sleep 0.2; done"
    ))
}

fn in_a_guest() -> Verdict {
    let scratch = Scratch::new("fs")?;
    let share = tree(&scratch)?;
    let (socket, other) = (scratch.path("api"), scratch.path("other"));
    sh(&format!("mkdir {other}; echo here >{other}/file"))?;
    let (home, fixed) = (
        format!("tag=home,source={share},xattr=on,id=home"),
        format!("tag=fixed,source={share},readonly=on,cache=never,id=fixed"),
    );
    let args = [
        "--virtiofsd",
        &tool("VIRTIOFSD")?,
        "--fs",
        &home,
        "--fs",
        &fixed,
        "--hotplug-ports",
        "2",
        "--api-socket",
        &socket,
    ];
    let mut guest = guest(&[], &scratch, &[], &args)?;
    mount(&mut guest, "home")?;
    mount(&mut guest, "fixed")?;

    // Bytes both ways, and whose they are.
    let big = sum(&format!("{share}/big"))?;
    guest.run(&format!(
        "cd /tmp/home; [ $(sha256sum <big | cut -d' ' -f1) = {big} ] && [ \"$(stat -c '%u:%g %a' big)\" = '1234:4321 640' ]"
    ))?;
    guest.run("head -c 16M /dev/urandom >new; chown 77:88 new; chmod 4751 new; sync; echo SUM=$(sha256sum <new | cut -d' ' -f1)")?;
    let new = sum(&format!("{share}/new"))?;
    check(guest.vmm.output().contains(&format!("SUM={new}")), || {
        guest.vmm.story(&format!("the host has {new}"))
    })?;
    facts(&format!("{share}/new"), "77:88 4751 regular file")?;
    guest.run("chroot --userspec=2001:2002 / sh -c 'true' 2>/dev/null; mkdir open; chmod 777 open; setpriv --reuid=2001 --regid=2002 --clear-groups sh -c 'umask 027; echo x >open/mine; mkdir open/sub; mkfifo open/pipe; ln -s mine open/link; ln open/mine open/twice'")?;
    facts(&format!("{share}/open/mine"), "2001:2002 640 regular file")?;
    facts(&format!("{share}/open/sub"), "2001:2002 750 directory")?;
    facts(&format!("{share}/open/pipe"), "2001:2002 640 fifo")?;
    facts(&format!("{share}/open/link"), "2001:2002 777 symbolic link")?;
    // As a group beside its own allows, by the group of its directory; and what a write takes away.
    guest.run("mkdir by; chown 0:3000 by; chmod 2770 by; as() { setpriv --reuid=2001 --regid=2002 $1 sh -c \"$2\"; }; as '--groups 3000' 'echo z >by/f'; [ $(stat -c %u:%g by/f) = 2001:3000 ]; ! as --clear-groups 'echo z >by/g' 2>/dev/null; chmod 4777 by/f; as '--groups 3000' 'echo z >>by/f'; [ $(stat -c %a by/f) = 777 ]")?;
    guest.run("python3 -c 'import os; f=\"old\"; os.setxattr(f,\"user.x\",b\"y\"); assert os.getxattr(f,\"user.x\")==b\"y\" and os.listxattr(f)==[\"user.x\"]; os.removexattr(f,\"user.x\"); assert os.listxattr(f)==[]'")?;
    guest.run("mv open/twice open/moved; rm open/mine; rmdir open/sub; truncate -s 5M open/moved; fallocate -l 6M open/moved; cp --reflink=never big copy; cmp big copy; flock open/moved true; touch -d 2001-02-03 open/moved; df . >/dev/null; ls -la >/dev/null; sync -f .; dd if=/dev/zero of=open/moved bs=4k count=4 conv=notrunc,fdatasync 2>/dev/null")?;
    guest
        .run("! mknod device b 7 0 2>/tmp/why; ! mknod device c 1 3 2>/tmp/why; ! [ -e device ]")?;

    // Nothing else of the host: links are the guest's to follow, and it has no such file.
    guest.run("! grep -rs SECRET absolute relative etc root/tmp /tmp/home/../secret; [ \"$(readlink etc)\" = /etc/passwd ]; cd /tmp/home/..; [ \"$(pwd -P)\" = /tmp ]; cd /tmp/home")?;
    guest.run("cat a/b/file; echo changed >old; [ $(cat /tmp/fixed/old) = changed ]")?;
    guest.run("! touch /tmp/fixed/no 2>/tmp/why; grep -q 'Read-only' /tmp/why; ! rm /tmp/fixed/old 2>/dev/null; ! chmod 600 /tmp/fixed/old 2>/dev/null; [ -s /tmp/fixed/old ]")?;
    audited(&socket, "virtiofsd")?;
    confined(&socket, &share)?;

    // Another one comes and goes.
    ctl(
        &socket,
        &["add-fs", &format!("tag=more,source={other},id=more")],
    )?;
    mount(&mut guest, "more")?;
    guest.run("[ $(cat /tmp/more/file) = here ]; echo there >/tmp/more/file; umount /tmp/more")?;
    check(sh(&format!("cat {other}/file"))?.trim() == "there", || {
        "the host has something else".to_owned()
    })?;
    ctl(&socket, &["remove-device", "more", "--timeout", "300"])?;
    check(device(&socket, "more")?.is_none(), || "it is there".into())?;

    // What was mounted fails then, and can be mounted anew.
    guest.run("cd /; exec 5</tmp/home/old")?;
    kill_process(&socket, "home")?;
    guest.run("! cat <&5 2>/tmp/why; cat /tmp/why; exec 5<&-; ls /tmp/home 2>&1 | head -n 3; umount -l /tmp/home")?;
    mount(&mut guest, "home")?;
    guest.run(
        "[ $(cat /tmp/home/old) = changed ]; echo again >/tmp/home/old; cat /tmp/fixed/a/b/file",
    )?;
    audited(&socket, "virtiofsd")?;
    guest.run("umount /tmp/home; umount /tmp/fixed")?;
    guest.ends()?;
    nothing_left(Duration::from_secs(20))
}

/// Its processes: no network but an empty one, nothing of the host's files but the directory, and no
/// capability but over files.
fn confined(socket: &str, share: &str) -> Verdict {
    let pid = |id: &str| -> Result<i64, String> {
        let found = device(socket, id)?.unwrap_or_default();
        found["pid"].as_i64().ok_or_else(|| found.to_string())
    };
    let (home, fixed) = (pid("home")?, pid("fixed")?);
    let seen = sh(&format!(
        "ls /proc/{home}/root; grep ' /share ' /proc/{home}/mountinfo; grep ' /share ' /proc/{fixed}/mountinfo
grep -E 'Cap(Prm|Bnd|Amb|Inh)|NoNewPrivs|Uid' /proc/{home}/status; wc -l </proc/{home}/net/dev; ls /proc/{home}/root/proc | grep -c -v '^[0-9]'"
    ))?;
    println!("[{}]", seen.replace('\n', "; "));
    let capabilities = |set: &str, mask: &str| seen.contains(&format!("{set}:\t{mask:0>16}"));
    check(
        capabilities("CapPrm", "800000db") && capabilities("CapBnd", "0"),
        || seen.clone(),
    )?;
    check(
        seen.contains(" /share rw,nosuid,nodev,noexec")
            && seen.contains(" /share ro,nosuid,nodev,noexec"),
        || format!("{share}: {seen}"),
    )
}

fn as_a_user() -> Verdict {
    let scratch = Scratch::new("fs-user")?;
    let share = scratch.path("share");
    sh(&format!("mkdir {share}; echo host >{share}/file"))?;
    let _undo = for_user(&scratch.path(""))?;
    let socket = scratch.path("api");
    let home = format!("tag=home,source={share},id=home");
    let args = [
        "--virtiofsd",
        &tool("VIRTIOFSD")?,
        "--fs",
        &home,
        "--api-socket",
        &socket,
    ];
    let mut guest = guest(&AS_USER, &scratch, &[], &args)?;
    mount(&mut guest, "home")?;
    guest.run("cd /tmp/home; [ \"$(stat -c %u:%g file)\" = 0:0 ]; [ $(cat file) = host ]; echo guest >new; mkdir dir; chown 5:6 new; setpriv --reuid=2001 --regid=2002 --clear-groups cat file; cd /")?;
    facts(&format!("{share}/new"), "65534:65534 644 regular file")?;
    audited(&socket, "virtiofsd")?;
    guest.run("umount /tmp/home")?;
    guest.ends()?;
    nothing_left(Duration::from_secs(20))
}

/// A `bulkhead serve` with these options.
fn serve(socket: &str, more: &[&str]) -> Result<Vmm, String> {
    let mut command = Command::new(bin("bulkhead"));
    command.args(["serve", "--api-socket", socket]).args(more);
    let mut vmm = Vmm::spawn(command)?;
    let end = Instant::now() + patience(LIMIT);
    while ctl(socket, &["info"]).is_err() {
        let waits = vmm.ended().is_none() && Instant::now() < end;
        check(waits, || vmm.story("no API"))?;
        std::thread::sleep(Duration::from_millis(50));
    }

    Ok(vmm)
}

fn without_a_guest() -> Verdict {
    let scratch = Scratch::new("fs-native")?;
    // The socket, too, is where paths are allowed.
    let socket = scratch.path("inside/api");
    let virtiofsd = tool("VIRTIOFSD")?;
    let kernel = guest_file("vmlinux");
    let kernel = sh(&format!("realpath {kernel}"))?;
    let kernel = kernel.trim();
    let (inside, outside) = (scratch.path("inside"), scratch.path("outside"));
    sh(&format!(
        "mkdir {inside} {outside} {inside}/one {inside}/two; ln -s {outside} {inside}/out; echo >{inside}/file; ln -s one {inside}/link"
    ))?;
    let create = |socket: &str, fs: &[&str]| {
        let mut args = vec!["create", "--kernel", kernel, "--memory", "96M"];
        args.extend(["--serial", "none", "--hotplug-ports", "2"]);
        args.extend(fs);
        ctl(socket, &args)
    };

    let mounts = format!("{inside}/mixed/below {inside}/kernels {inside}/one/later");
    let _undo = Undo::new(format!("umount {mounts} 2>/dev/null"));
    sh(&format!(
        "mkdir -p {mounts}; mount -t tmpfs none {inside}/mixed/below; mount -t proc none {inside}/kernels"
    ))?;

    // Without a program there is none to start; nothing is looked for.
    let without = scratch.path("without");
    let vmm = serve(&without, &[])?;
    let one = format!("tag=one,source={inside}/one");
    refused(
        create(&without, &["--fs", &one]),
        "start it with --virtiofsd PATH",
    )?;
    drop(vmm);
    for (program, why) in [
        (
            "/nonexistent/virtiofsd",
            "give --virtiofsd the path of virtiofsd",
        ),
        ("/etc/passwd", "is no program of this machine"),
    ] {
        let output = bulkhead(&["serve", "--api-socket", &without, "--virtiofsd", program])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        check(!output.status.success() && said.contains(why), || said)?;
    }

    let vmm = serve(
        &socket,
        &[
            "--virtiofsd",
            &virtiofsd,
            "--allow-path",
            kernel,
            "--allow-path",
            &inside,
        ],
    )?;
    for (fs, why) in [
        (
            format!("tag=a,source={outside}"),
            "not under an allowed path",
        ),
        (
            format!("tag=a,source={inside}/out"),
            "not under an allowed path",
        ),
        (
            format!("tag=a,source={inside}/one/../../outside"),
            "not under an allowed path",
        ),
        (
            format!("tag=a,source={inside}/none"),
            "no such file or directory; name a directory",
        ),
        (
            format!("tag=a,source={inside}/file"),
            "not a directory; name a directory",
        ),
        (
            format!("tag=a,source={inside}/one,memory=1M"),
            "give at least",
        ),
        (format!("source={inside}/one"), "tag=NAME is missing"),
        (
            format!("tag=a,source={inside}/mixed"),
            "has other file systems mounted below it",
        ),
        (
            format!("tag=a,source={inside}/kernels"),
            "is the kernel's own",
        ),
    ] {
        let result = create(&socket, &["--fs", &fs]);
        let line = result.as_ref().err().cloned().unwrap_or_default();
        check(line.trim().lines().count() == 1, || line.clone())?;
        refused(result, why)?;
    }
    let two = format!("tag=two,source={inside}/link,readonly=on,cache=always,xattr=on,cpu=50");
    create(&socket, &["--fs", &one, "--fs", &two])?;
    let config = ctl(&socket, &["info"])?["config"]["fs"].clone();
    check(
        config[0]["id"] == "fs0" && config[1]["readonly"] == true && config[1]["cache"] == "always",
        || config.to_string(),
    )?;
    let found = device(&socket, "fs1")?.unwrap_or_default();
    check(found["kind"] == "fs" && found["state"] == "ready", || {
        found.to_string()
    })?;
    audited(&socket, "virtiofsd")?;
    // What is mounted on the host now is not in its root; none of its files is the host's.
    let pid = found["pid"].to_string();
    sh(&format!("mount -t tmpfs none {inside}/one/later"))?;
    let one_of_them = device(&socket, "fs0")?.unwrap_or_default()["pid"].to_string();
    for pid in [&pid, &one_of_them] {
        let held = sh(&format!(
            "cat /proc/{pid}/mountinfo; for n in exe fd/0 fd/1; do readlink /proc/{pid}/$n; done"
        ))?;
        let strange = ["master:", "shared:", "/later", "/dev/null"];
        let strange = strange.iter().find(|word| held.contains(*word));
        let own =
            held.contains("/memfd:virtiofsd (deleted)") && held.matches("pipe:[").count() == 2;
        check(strange.is_none() && own, || format!("{strange:?}: {held}"))?;
    }
    // Another one would be refused the directory.
    sh(&format!("umount {inside}/one/later"))?;
    let usage = ctl(&socket, &["stats", "fs1"])?["usage"].clone();
    check(usage["limits"]["cpu_percent"] == 50, || usage.to_string())?;
    ctl(&socket, &["limit", "fs0", "--memory", "256M"])?;
    kill_process(&socket, "fs0")?;
    let again = ctl(
        &socket,
        &["add-fs", &format!("tag=two,source={inside}/two,id=again")],
    );
    refused(again, "fs.tag two is taken")?;
    let nowhere = format!("tag=x,source={outside},id=x");
    refused(
        ctl(&socket, &["add-fs", &nowhere]),
        "not under an allowed path",
    )?;
    ctl(
        &socket,
        &[
            "add-fs",
            &format!("tag=x,source={inside}/two,id=x"),
            "--port",
            "hp2",
        ],
    )?;
    kill_process(&socket, "x")?;
    audited(&socket, "virtiofsd")?;
    ctl(&socket, &["remove-device", "x"])?;
    ctl(&socket, &["remove-device", "fs1"])?;
    for (id, lives) in [("fs0", 1), ("fs1", 0), ("x", 0)] {
        told_from_start_to_end(&socket, id, lives)?;
    }
    let spawned = device(&socket, "fs0")?.unwrap_or_default()["spawn_us"].clone();
    check(spawned.as_u64() > Some(0), || spawned.to_string())?;
    let left = ctl(&socket, &["info"])?["config"]["fs"].clone();
    check(left.as_array().map(Vec::len) == Some(1), || {
        left.to_string()
    })?;
    ctl(&socket, &["shutdown", "--force"])?;
    drop(vmm);
    nothing_left(Duration::from_secs(20))?;
    // No more than the tests made themselves.
    let left = sh(&format!(
        "pgrep -af 'shared-dir=/[s]hare' || true; ls {inside}"
    ))?;
    check(
        left.split_whitespace().collect::<Vec<_>>()
            == ["file", "kernels", "link", "mixed", "one", "out", "two"],
        || left.clone(),
    )
}

/// Whether each process of a device is told from its start to its end by pid and incarnation, and
/// so many live.
fn told_from_start_to_end(socket: &str, id: &str, lives: usize) -> Verdict {
    let output = bulkhead(&["ctl", "--socket", socket, "--json", "events"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut running = Vec::new();
    let mut told = 0;
    for line in text.lines() {
        let event: serde_json::Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
        if event["subject"] != id {
            continue;
        }
        let process = (
            event["what"]["pid"].as_i64().unwrap_or(0),
            event["what"]["incarnation"].as_u64().unwrap_or(0),
        );
        let known = running.iter().position(|p| *p == process);
        match event["kind"].as_str().unwrap_or_default() {
            "device.spawned" => {
                let good = process.0 > 0 && process.1 > 0 && known.is_none();
                check(good, || text.clone())?;
                running.push(process);
                told += 1;
            }
            "device.ready" => check(known.is_some(), || format!("{event}: {text}"))?,
            "device.exited" => {
                let at = known.ok_or_else(|| format!("{event}: {text}"))?;
                running.remove(at);
            }
            _ => {}
        }
    }
    check(running.len() == lives && told > lives, || {
        format!("{id}: {running:?} of {told}: {text}")
    })
}

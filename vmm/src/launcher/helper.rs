//! External helpers: programs of somebody else's that run for a VM, each under a policy of its
//! own with named exceptions (`seccomp/policies/passt.toml` lists passt's; virtiofsd is `helper_fs`'s).
//!
//! A helper is known by its kind. What it may be told is checked against the kind's own
//! grammar, so that nobody's request reaches its command line as it is. Like a device process
//! it is cloned into namespaces of its own (but for the host's network), has an id and a pipe
//! for what it says, and ends with the launcher. Its root holds what its loader needs, and
//! nothing of the host else.
//!
//! The VMM finds the program before confinement ([`Program::find`]); the launcher, on its only
//! thread, makes command lines ([`arguments`]); the child between clone and exec makes the
//! root ([`Root::enter`]).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::helper_fs::{self, Share};
use super::{isolate, printable};

/// passt's kind.
pub const PASST: &str = "passt";
/// virtiofsd's.
pub const VIRTIOFSD: &str = "virtiofsd";
/// Said of a helper whose program the launcher does not have.
const NOT_GIVEN: &str = "was given when the VMM was started: start it with";
/// Said of a helper on a host without user namespaces.
pub const NO_NAMESPACE: &str = "confines itself by a user namespace, and this host forbids them";
/// Where passt is looked for.
const PASST_PATHS: [&str; 3] = ["/usr/bin/passt", "/usr/local/bin/passt", "/bin/passt"];
/// The directories that a dynamic program's loader looks in.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];
/// Descriptor of a helper's first own one: after stdin, stdout and the log.
pub const FIRST_FD: usize = 3;
/// What passt takes for an MTU.
const MTU: std::ops::RangeInclusive<u16> = 68..=65521;
/// Most options of a helper.
const MAX_OPTIONS: usize = 80;

/// Whether a refusal to start a helper stands as long as the launcher lives.
pub fn lasting(why: &str) -> bool {
    why.contains(NOT_GIVEN) || why.contains(NO_NAMESPACE)
}

/// That the launcher has no program of this kind, with the remedy.
pub fn not_given(kind: &str) -> String {
    format!("no {} {NOT_GIVEN} --{0} PATH", printable(kind))
}

/// A helper's program, opened before confinement.
#[derive(Debug)]
pub struct Program {
    /// Its kind.
    pub kind: &'static str,
    /// It.
    pub file: File,
    /// Where its libraries are; none: it is static.
    pub libraries: Vec<PathBuf>,
    /// Address space of its own data, which RLIMIT_DATA counts, used or not.
    pub data: u64,
}

impl Program {
    /// passt: at `path`, or where it is usually installed. With a CPU that has AVX2, the build
    /// that passt itself would look for and execute instead.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn find(path: Option<&Path>) -> Result<Self, String> {
        let open = |path: &Path| {
            let fast = PathBuf::from(format!("{}.avx2", path.display()));
            if avx2()
                && let Ok(file) = File::open(&fast)
            {
                return Ok((file, fast));
            }
            File::open(path).map(|file| (file, path.to_owned()))
        };
        let found = match path {
            Some(path) => open(path).map_err(|error| {
                format!(
                    "passt {}: {error}; give --passt the path of passt with vhost-user (2024_11_27 or later)",
                    printable(&path.to_string_lossy())
                )
            })?,
            None => PASST_PATHS
                .iter()
                .find_map(|path| open(Path::new(path)).ok())
                .ok_or_else(|| {
                    format!(
                        "passt: not found ({}): install passt with vhost-user (2024_11_27 or later, Debian 13), or name it with --passt PATH",
                        PASST_PATHS.join(", ")
                    )
                })?,
        };
        Self::read(PASST, found)
    }

    /// virtiofsd: at `path`, or where it is usually installed.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn find_virtiofsd(path: Option<&Path>) -> Result<Self, String> {
        let open = |path: &Path| File::open(path).map(|file| (file, path.to_owned()));
        let found = match path {
            Some(path) => open(path).map_err(|error| {
                format!(
                    "virtiofsd {}: {error}; give --virtiofsd the path of virtiofsd 1.13 or later",
                    printable(&path.to_string_lossy())
                )
            })?,
            None => helper_fs::PATHS
                .iter()
                .find_map(|path| open(Path::new(path)).ok())
                .ok_or_else(|| {
                    format!(
                        "virtiofsd: not found ({}): install virtiofsd 1.13 or later, or name it with --virtiofsd PATH",
                        helper_fs::PATHS.join(", ")
                    )
                })?,
        };
        let name = printable(&found.1.to_string_lossy());
        let mut program = Self::read(VIRTIOFSD, found)?;
        program.file = helper_fs::sealed(&program.file)
            .map_err(|error| format!("virtiofsd {name}: a copy of it in memory: {error}"))?;
        Ok(program)
    }

    fn read(kind: &'static str, (file, path): (File, PathBuf)) -> Result<Self, String> {
        let image = Image::of(&file)
            .map_err(|error| format!("{kind} {}: {error}", printable(&path.to_string_lossy())))?;
        Ok(Self {
            kind,
            file,
            libraries: image.loader.as_deref().map(libraries).unwrap_or_default(),
            data: image.data,
        })
    }
}

fn avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The directories that a program with this loader needs.
fn libraries(loader: &Path) -> Vec<PathBuf> {
    let standard = LIBRARIES.iter().any(|dir| loader.starts_with(dir));
    match loader.parent() {
        Some(parent) if !standard => vec![parent.to_owned()],
        _ => LIBRARIES.iter().map(PathBuf::from).collect(),
    }
}

/// What a program's headers say of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Image {
    /// PT_INTERP: the loader that the kernel starts it with.
    loader: Option<PathBuf>,
    /// Bytes of its writable segments, in memory.
    data: u64,
}

impl Image {
    /// Reads them from a 64-bit little-endian ELF file.
    fn of(file: &File) -> Result<Self, String> {
        const PT_LOAD: u64 = 1;
        const PT_INTERP: u64 = 3;
        const PF_W: u64 = 2;
        let header = read(file, 0, 64)?;
        if !header.starts_with(b"\x7fELF\x02\x01") {
            return Err(no_program());
        }
        let (table, size, count) = (
            number(&header, 32, 8),
            number(&header, 54, 2),
            number(&header, 56, 2),
        );
        if size < 56 {
            return Err(no_program());
        }
        let mut image = Self::default();
        for index in 0..count.min(128) {
            let at = size
                .checked_mul(index)
                .and_then(|offset| table.checked_add(offset))
                .ok_or_else(no_program)?;
            let entry = read(file, at, 56)?;
            match number(&entry, 0, 4) {
                PT_LOAD if number(&entry, 4, 4) & PF_W != 0 => {
                    image.data = image.data.saturating_add(number(&entry, 40, 8));
                }
                PT_INTERP if image.loader.is_none() => image.loader = Some(loader(file, &entry)?),
                _ => {}
            }
        }
        Ok(image)
    }
}

fn no_program() -> String {
    "is no program of this machine; give another".to_owned()
}

fn read(file: &File, offset: u64, length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|_| no_program())?;
    Ok(bytes)
}

/// A little-endian number in a header.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let part = bytes.get(at..at.saturating_add(length)).unwrap_or_default();
    part.iter()
        .rev()
        .fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The path that a PT_INTERP entry leads to.
fn loader(file: &File, entry: &[u8]) -> Result<PathBuf, String> {
    let length = usize::try_from(number(entry, 32, 8)).unwrap_or(usize::MAX);
    if !(2..=4096).contains(&length) {
        return Err(no_program());
    }
    let mut name = read(file, number(entry, 8, 8), length)?;
    name.truncate(name.iter().position(|b| *b == 0).ok_or_else(no_program)?);
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(&name));
    match path.is_absolute() {
        true => Ok(path),
        false => Err(no_program()),
    }
}

/// The command line of a helper, argv[0] included, from the options of a request:
///
/// | option | means |
/// |---|---|
/// | `mtu=N` | the MTU that the guest is told, 68 to 65521 |
/// | `tcp=ADDRESS/HOST:GUEST` | connections to HOST at ADDRESS go to the guest's GUEST |
/// | `udp=ADDRESS/HOST:GUEST` | datagrams likewise |
///
/// # Errors
/// One line that names the option.
pub fn arguments(kind: &str, options: &[String]) -> Result<Vec<CString>, String> {
    if kind != PASST {
        return Err(format!("{}: not a kind of helper", printable(kind)));
    }
    if options.len() > MAX_OPTIONS {
        return Err(format!("more than {MAX_OPTIONS} options"));
    }
    // passt knows by argv[0] what it is; --fd ends it with its connection.
    let mut argv = [
        "passt",
        "--vhost-user",
        "--foreground",
        "--quiet",
        "--fd",
        "3",
        // Else the gateway's address would lead the guest to whatever the host serves to itself.
        "--no-map-gw",
    ]
    .map(str::to_owned)
    .to_vec();
    argv.extend(resolver(
        &fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    ));
    for option in options {
        let bad = || format!("{}: not an option of passt", printable(option));
        let (key, value) = option.split_once('=').ok_or_else(bad)?;
        match key {
            "mtu" => {
                let mtu = value.parse::<u16>().ok().filter(|mtu| MTU.contains(mtu));
                argv.extend(["--mtu".to_owned(), mtu.ok_or_else(bad)?.to_string()]);
            }
            "tcp" | "udp" => {
                let flag = if key == "tcp" {
                    "--tcp-ports"
                } else {
                    "--udp-ports"
                };
                let (address, ports) = value.split_once('/').ok_or_else(bad)?;
                let (host, guest) = ports.split_once(':').ok_or_else(bad)?;
                let address: IpAddr = address.parse().map_err(|_| bad())?;
                let port = |text: &str| text.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(bad);
                let (host, guest) = (port(host)?, port(guest)?);
                argv.extend([flag.to_owned(), format!("{address}/{host}:{guest}")]);
            }
            _ => return Err(bad()),
        }
    }
    argv.into_iter()
        .map(|arg| CString::new(arg).map_err(|e| e.to_string()))
        .collect()
}

/// A host whose resolver listens on a loopback address (systemd-resolved) has one that the
/// guest cannot reach. passt forwards to it what is sent to an address of our choice, which it
/// tells the guest: link-local, so that it hides nothing.
fn resolver(resolv_conf: &str) -> Vec<String> {
    const FORWARDER: &str = "169.254.53.53";
    let mut servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok())?
    });
    match servers.next() {
        // passt maps between addresses of one family.
        Some(first) if first.is_loopback() && first.is_ipv4() => {
            let host = first.to_string();
            [
                "--dns-forward",
                FORWARDER,
                "--dns",
                FORWARDER,
                "--dns-host",
                &host,
            ]
            .map(str::to_owned)
            .to_vec()
        }
        _ => Vec::new(),
    }
}

/// What a helper's first root holds.
pub struct Root<'a> {
    /// Directories of the host, read-only, at their own paths.
    pub libraries: &'a [PathBuf],
    /// virtiofsd's directory.
    pub share: Option<&'a Share>,
}

impl Root<'_> {
    /// Makes the root and enters it: the libraries, /proc, and virtiofsd's directory, or a copy of
    /// resolv.conf and an empty /tmp for passt to mount its own empty root on.
    ///
    /// # Errors
    /// One line that says which step.
    pub fn enter(&self) -> Result<(), String> {
        let step = |what: &str, result: io::Result<()>| {
            result.map_err(|error| format!("its root: {what}: {error}"))
        };
        let options = [
            (c"mode", c"0755"),
            (c"size", c"256k"),
            (c"nr_inodes", c"256"),
            (c"source", c"helper"),
        ];
        let root = isolate::tmpfs(&options).map_err(|e| format!("its root: {e}"))?;
        let here = PathBuf::from(format!("/proc/self/fd/{}", root.as_fd().as_raw_fd()));
        let mut mounts = Vec::new();
        for directory in self.libraries {
            let Ok(name) = CString::new(directory.as_os_str().as_bytes()) else {
                continue;
            };
            let tree = match isolate::clone_tree(&name) {
                // Hosts differ in which of the standard ones they have.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(|e| {
                    format!("its root: {}: {e}", printable(&directory.to_string_lossy()))
                })?,
            };
            let place = directory.strip_prefix("/").unwrap_or(directory);
            step("a directory", fs::create_dir_all(here.join(place)))?;
            mounts.push((tree, place.to_owned()));
        }
        if let Some(share) = self.share {
            mounts.extend(share.fill(&here)?);
            return step("entering", isolate::enter_built_root(root.as_fd(), &mounts));
        }
        let proc = isolate::new_proc()
            // Where parts of /proc are hidden (a container), a new one is forbidden.
            .or_else(|_| isolate::clone_tree(c"/proc"));
        mounts.push((
            proc.map_err(|e| format!("its root: /proc: {e}"))?,
            "proc".into(),
        ));
        for directory in ["proc", "tmp", "etc"] {
            step("a directory", fs::create_dir_all(here.join(directory)))?;
        }
        let resolv_conf = fs::read("/etc/resolv.conf").unwrap_or_default();
        let shown = resolv_conf.get(..65536).unwrap_or(&resolv_conf);
        step(
            "resolv.conf",
            fs::write(here.join("etc/resolv.conf"), shown),
        )?;
        step("entering", isolate::enter_built_root(root.as_fd(), &mounts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Result<Vec<String>, String> {
        let list: Vec<String> = list.iter().map(|o| (*o).to_owned()).collect();
        let argv = arguments(PASST, &list)?;
        Ok(argv
            .iter()
            .map(|arg| arg.to_str().unwrap().to_owned())
            .collect())
    }

    #[test]
    fn options_become_arguments_and_nothing_else_does() {
        let argv = options(&["mtu=1400", "tcp=127.0.0.1/8080:80", "udp=::1/5300:53"]).unwrap();
        assert_eq!(argv[..2], ["passt", "--vhost-user"]);
        let tail = argv.iter().rev().take(6).rev().cloned().collect::<Vec<_>>();
        assert_eq!(
            tail,
            [
                "--mtu",
                "1400",
                "--tcp-ports",
                "127.0.0.1/8080:80",
                "--udp-ports",
                "::1/5300:53"
            ]
        );
        for bad in [
            "",
            "--pcap=/tmp/x",
            "mtu=67",
            "mtu=65522",
            "tcp=8080:80",
            "tcp=127.0.0.1/8080",
            "tcp=127.0.0.1/0:80",
            "tcp=127.0.0.1/8080:80,90:90",
            "tcp=127.0.0.1%eth0/8080:80",
            "udp=all",
            "log-file=/etc/passwd",
        ] {
            let line = options(&[bad]).unwrap_err();
            assert!(line.ends_with("not an option of passt"), "{line}");
        }
        assert!(arguments("pasta", &[]).is_err());
        assert!(options(&["mtu=1400"; MAX_OPTIONS + 1]).is_err());
    }

    #[test]
    fn a_resolver_of_the_host_alone_is_reached_through_passt() {
        assert!(resolver("").is_empty());
        assert!(resolver("# x\nsearch a\nnameserver 10.0.0.1\nnameserver 127.0.0.1\n").is_empty());
        let args = resolver("options edns0\nnameserver 127.0.0.53\n");
        assert_eq!(args.first().map(String::as_str), Some("--dns-forward"));
        assert_eq!(args.last().map(String::as_str), Some("127.0.0.53"));
        assert!(resolver("nameserver ::1").is_empty());
    }

    #[test]
    fn a_programs_loader_says_where_its_libraries_are() {
        let shell = File::open("/bin/sh").unwrap();
        let image = Image::of(&shell).unwrap();
        let loader = image.loader.unwrap();
        assert!((1..1 << 30).contains(&image.data), "{}", image.data);
        assert!(loader.is_absolute());
        assert_eq!(libraries(&loader).len(), LIBRARIES.len());
        assert_eq!(
            libraries(Path::new("/opt/passt/ld.so")),
            [PathBuf::from("/opt/passt")]
        );
        let me = File::open("/proc/self/exe").unwrap();
        let image = Image::of(&me).unwrap();
        assert_eq!(image.loader, None, "the tests are a static program");
        let text = File::open("/proc/self/maps").unwrap();
        assert!(Image::of(&text).unwrap_err().contains("no program"));
        let line = Program::find(Some(Path::new("/nonexistent/passt"))).unwrap_err();
        assert!(line.contains("--passt") && !line.contains('\n'), "{line}");
    }
}

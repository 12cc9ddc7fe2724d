//! Files are read and printed alike, whatever is in them, and what is wrong is named.

use bulkhead_proto::protobuf::reflect::{
    FieldDescriptor, MessageDescriptor, ReflectValueBox, RuntimeFieldType, RuntimeType,
};
use bulkhead_proto::protobuf::{MessageDyn, MessageFull};
use clap::Parser;
use proptest::prelude::*;

use super::*;
use crate::cli::machine_args::MachineArgs;

/// Fills messages by their descriptors: a field that has no key shows.
struct Filler {
    state: u64,
    /// Every field has a value.
    full: bool,
    /// Which one of several that exclude each other.
    turn: usize,
}

impl Filler {
    fn below(&mut self, end: u64) -> u64 {
        self.state = self.state.wrapping_mul(6364136223846793005);
        self.state = self.state.wrapping_add(1442695040888963407);
        (self.state >> 33) % end
    }

    /// Leave a field as it is?
    fn skips(&mut self) -> bool {
        !self.full && self.below(2) == 0
    }

    fn text(&mut self) -> String {
        let letters = [
            'a', '/', '"', '\\', '\n', '\t', '\u{7f}', '\0', 'é', '#', '\'', '\u{2028}',
        ];
        let count = 1 + self.below(6);
        (0..count)
            .map(|_| letters[self.below(letters.len() as u64) as usize])
            .collect()
    }

    fn value(&mut self, kind: &RuntimeType) -> ReflectValueBox {
        let small = 1 + self.below(1000);
        match kind {
            RuntimeType::I32 => (small as i32).into(),
            RuntimeType::U32 => match self.below(4) {
                0 => u32::MAX.into(),
                _ => (small as u32).into(),
            },
            RuntimeType::U64 => match self.below(4) {
                0 => u64::MAX.into(),
                1 => small.into(),
                _ => (small << self.below(50)).into(),
            },
            RuntimeType::Bool => true.into(),
            RuntimeType::String => self.text().into(),
            RuntimeType::VecU8 => (0..small % 9 + 1)
                .map(|byte| byte as u8)
                .collect::<Vec<u8>>()
                .into(),
            RuntimeType::Enum(kind) => {
                let count = kind.values().count() as u64;
                // Not the first one: that is no value.
                let chosen = 1 + self.below(count - 1);
                kind.value_by_index(chosen as usize).into()
            }
            RuntimeType::Message(kind) => ReflectValueBox::Message(self.message(kind)),
            other => panic!("{other:?}: a type that files do not have"),
        }
    }

    fn message(&mut self, kind: &MessageDescriptor) -> Box<dyn MessageDyn> {
        let mut message = kind.new_instance();
        let several: Vec<FieldDescriptor> = kind
            .oneofs()
            .flat_map(|o| o.fields().collect::<Vec<_>>())
            .collect();
        let chosen = several
            .get(self.turn % several.len().max(1))
            .map(|f| f.number());
        for field in kind.fields() {
            let among = several.iter().any(|f| f.number() == field.number());
            let needed = matches!(field.name(), "id" | "cpus")
                || field.name() == "serial" && kind.name() == "MachineConfig";
            if among && chosen != Some(field.number()) || !needed && self.skips() {
                continue;
            }
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(of) => {
                    let value = self.value(&of);
                    field.set_singular_field(&mut *message, value);
                }
                RuntimeFieldType::Repeated(of) => {
                    for _ in 0..=self.below(2) {
                        let value = self.value(&of);
                        field.mut_repeated(&mut *message).push(value);
                    }
                }
                RuntimeFieldType::Map(..) => panic!("files have no maps"),
            }
        }
        message
    }

    fn config(seed: u64, full: bool, turn: usize) -> MachineConfig {
        let mut filler = Self {
            state: seed,
            full,
            turn,
        };
        let config = filler.message(&MachineConfig::descriptor());
        *config.downcast_box().unwrap()
    }
}

fn read(text: &str) -> Result<MachineConfig, String> {
    parse(text)
        .map(|(config, _)| config)
        .map_err(|fault| format!("{}: {}", fault.line, fault.text))
}

fn printed_and_read(config: &MachineConfig) {
    let text = print(config).unwrap();
    assert_eq!(read(&text).as_ref(), Ok(config), "{text}");
    assert_eq!(print(&read(&text).unwrap()).unwrap(), text);
}

#[test]
fn every_field_of_a_machine_has_a_key() {
    for turn in 0..3 {
        printed_and_read(&Filler::config(7, true, turn));
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read_as_the_same(seed: u64, full: bool, turn in 0_usize..3) {
        printed_and_read(&Filler::config(seed, full, turn));
    }

    #[test]
    fn no_text_is_too_much(text in "[\\[\\]a-z_.=\"0-9{}, \n]{0,200}") {
        if let Err(line) = read(&text) {
            prop_assert!(!line.contains('\n'), "{}", line);
        }
    }
}

#[test]
fn what_is_left_out_is_as_on_the_command_line() {
    let config = read("kernel = '/k'\n[[disk]]\npath = '/d'\n[[vhost_user]]\ndevice_id = 26\n[[vhost_user]]\ndevice_id = 62\n[vsock]").unwrap();
    assert_eq!(config.cmdline, "console=ttyS0");
    assert_eq!((config.memory_bytes, config.cpus.boot), (512 << 20, 1));
    assert_eq!(config.serial.mode, Mode::STDIO.into());
    assert_eq!(config.disks[0].id, "disk0");
    assert_eq!(config.vhost_users[0].id, "fs0");
    assert_eq!(config.vhost_users[1].id, "vhost1");
    assert_eq!(config.vsock.id, "vsock");
    assert_eq!(read("kernel = '/k'\ncmdline = ''").unwrap().cmdline, "");
}

#[test]
fn sizes_and_addresses_are_spelled_in_several_ways() {
    let text =
        "memory = { size = 0x4000_0000, max = '2G' }\n[[net]]\nmac = '525400aAbb01'\nuser = {}\n";
    let config = read(text).unwrap();
    assert_eq!(
        (config.memory_bytes, config.memory_max_bytes),
        (1 << 30, 2 << 30)
    );
    let text = print(&config).unwrap();
    assert!(text.contains("size = \"1G\"\nmax = \"2G\"\n"), "{text}");
    assert!(text.contains("mac = \"52:54:00:aa:bb:01\"\n"), "{text}");
    assert!(text.contains("[net.user]\n"), "{text}");
}

#[test]
fn what_is_wrong_is_named_by_line_and_key_with_a_remedy() {
    for (text, wanted) in [
        ("kernel = 1", "1: kernel is 1: give a text, in quotes"),
        (
            "\n\nkernal = '/k'",
            "3: kernal is unknown: the keys of a configuration are kernel, initrd, ",
        ),
        (
            "[[disk]]\n[[disk]]\npth = '/d'",
            "3: disk[1].pth is unknown: the keys of disk[1] are id, path, ",
        ),
        (
            "[memory]\nsize = 'lots'",
            "2: memory.size is \"lots\": give bytes, or a text with K, M, G or T",
        ),
        ("[memory]\nsize = -1", "2: memory.size is -1: give"),
        ("memory = '1G'", "1: memory is \"1G\": give a table"),
        (
            "[cpus]\nboot = 1.5",
            "2: cpus.boot is a fraction: give a whole number",
        ),
        (
            "[cpus]\nboot = 4294967296",
            "2: cpus.boot is 4294967296: give a whole number",
        ),
        (
            "[cpus]\npin = [0, '1']",
            "2: cpus.pin is \"1\": give a list of whole numbers",
        ),
        (
            "[cpus]\npin = 1",
            "2: cpus.pin is 1: give a list of whole numbers",
        ),
        (
            "hotplug_ports = [1]",
            "1: hotplug_ports is 1: give a list of texts",
        ),
        (
            "[disk]\npath = '/d'",
            "1: disk is a table: give a list of tables, each begun by [[disk]]",
        ),
        ("disk = ['/d']", "1: disk is a list: give a list of tables"),
        (
            "[[disk]]\nreadonly = 'on'",
            "2: disk[0].readonly is \"on\": give true or false",
        ),
        (
            "[[disk]]\nformat = 'vdi'",
            "2: disk[0].format is \"vdi\": give one of \"raw\", \"qcow2\"",
        ),
        (
            "[[disk]]\n[disk.limits.operations]\nper_second = '1K'",
            "3: disk[0].limits.operations.per_second is \"1K\": give a whole number",
        ),
        (
            "[[net]]\nmac = '52:54'\n[[net]]\nmac = '5:254'",
            "4: net[1].mac is \"5:254\": give two hexadecimal digits",
        ),
        (
            "[[net]]\nuser = {}\ntap = {}",
            "1: net[0] has more than one of tap, vhost_user and user: give one of them",
        ),
        (
            "[[net]]\n[net.tap]\nfds = [-1]",
            "3: net[0].tap.fds is -1: give a list of whole numbers",
        ),
        (
            "kernel = '/k'\nkernel = '/l'",
            "2: duplicate key: \"kernel\": give each key and each table once",
        ),
        (
            "[cpus]\n[cpus]",
            "2: duplicate key: \"cpus\": give each key and each table once",
        ),
        ("kernel = /k", "1: "),
        ("= 1", "1: "),
    ] {
        let line = read(text).unwrap_err();
        assert!(line.starts_with(wanted), "{text}: {line}");
        assert!(!line.contains('\n'), "{line}");
    }
}

/// A file and a command line.
struct Bed(std::path::PathBuf);

impl Bed {
    fn new(name: &str, text: &[u8]) -> Self {
        let path =
            std::env::temp_dir().join(format!("bh-config-{name}-{}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn machine(&self, options: &[&str]) -> Result<MachineConfig, String> {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            machine: MachineArgs,
        }
        let file = self.0.to_str().unwrap();
        let line = ["bulkhead", "--config", file]
            .into_iter()
            .chain(options.iter().copied());
        let refused = Line::try_parse_from(line).unwrap().machine.to_config();
        refused.map_err(|line| line.replace(file, "FILE"))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn options_add_to_lists_and_replace_single_values() {
    let text = "kernel = '/k'\ninitrd = '/i'\nhotplug_ports = ['hp1', 'x']\n[memory]\nsize = '1G'\nmax = '2G'\n[cpus]\nboot = 2\n[serial]\nmode = 'file'\npath = '/s'\n[[disk]]\npath = '/a'\n[[net]]\nuser = {}\n[vsock]\nsocket = '/v'\n";
    let bed = Bed::new("merge", text.as_bytes());
    let file = bed.machine(&[]).unwrap();
    assert_eq!((file.cpus.boot, file.disks.len()), (2, 1));
    let options = [
        "--kernel",
        "/other",
        "--memory",
        "256M",
        "--serial",
        "none",
        "--hotplug-ports",
        "2",
    ];
    let devices = [
        "--disk",
        "path=/b",
        "--vsock",
        "socket=/w,id=w",
        "--rng",
        "--net",
        "tap=t",
    ];
    let both = bed
        .machine(&[options.as_slice(), devices.as_slice()].concat())
        .unwrap();
    assert_eq!(
        (both.kernel.as_str(), both.initrd.as_str()),
        ("/other", "/i")
    );
    assert_eq!((both.memory_bytes, both.memory_max_bytes), (256 << 20, 0));
    assert_eq!((both.cpus.boot, both.serial.path.as_str()), (2, ""));
    assert_eq!(both.hotplug_ports, ["hp1", "x", "hp2", "hp3"]);
    let ids: Vec<&str> = both.disks.iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(
        (ids, both.nets.len(), both.rngs.len()),
        (vec!["disk0", "disk1"], 2, 1)
    );
    assert_eq!(both.vsock.id, "w");
    printed_and_read(&both);
}

#[test]
fn a_refusal_names_the_file_or_the_option_that_it_is_of() {
    let text = "kernel = '/k'\n[[disk]]\npath = '/a'\nqueues = 1000\n";
    let bed = Bed::new("file", text.as_bytes());
    let line = bed.machine(&[]).unwrap_err();
    assert!(
        line.starts_with("--config FILE:4: disk[0].queues is 1000: give 0 to 64"),
        "{line}"
    );
    for (text, options, wanted) in [
        ("", vec![], "--config FILE: kernel is missing: give"),
        (
            "kernel = 'k'",
            vec![],
            "--config FILE:1: kernel is \"k\": give an absolute path",
        ),
        (
            "[memory]\nsize = '1G'\nmax = '1G'\n",
            vec!["--kernel", "/k"],
            "--config FILE:3: memory.max is 1073741824: give more than memory.size",
        ),
        (
            "kernel = '/k'\n[[disk]]\npath = '/a'",
            vec!["--disk", "path=/b,id=disk0"],
            "--disk path=/b,id=disk0: the id disk0 is taken",
        ),
        (
            "kernel = '/k'\n[[net]]\ntap = { name = 'a' }",
            vec!["--net", "tap=a"],
            "--net tap=a: tap.name: a is another device's tap",
        ),
        (
            "kernel = '/k'\n[[console]]\n[[console.port]]\n[[console.port]]\nsocket = '/s'",
            vec![],
            "--config FILE:3: console[0].port[0].socket is \"\": give",
        ),
        (
            "kernel = '/k'\n[[net]]\n[[net.user.forward]]\n",
            vec![],
            "--config FILE:3: net[0].user.forward[0]",
        ),
        (
            "kernel = '/k'\n[[port]]\nname = 'a'\ndevice = 32",
            vec![],
            "--config FILE:4: port[0].device is 32",
        ),
        (
            "kernel = '/k'\n[cpus]\nboot = 0",
            vec![],
            "--config FILE:3: cpus.boot is 0: give",
        ),
    ] {
        let bed = Bed::new("refusals", text.as_bytes());
        let line = bed.machine(&options).unwrap_err();
        assert!(line.starts_with(wanted), "{text}: {line}");
        assert!(!line.contains("config."), "{line}");
    }
}

#[test]
fn a_file_is_bounded_and_of_text() {
    let long = vec![b'#'; 1 + (1 << 20)];
    let line = Bed::new("long", &long).machine(&[]).unwrap_err();
    assert!(
        line.contains("longer than 1048576 bytes: a configuration is not; name the right file"),
        "{line}"
    );
    // What just fits is read.
    let line = Bed::new("fits", &long[1..]).machine(&[]).unwrap_err();
    assert!(line.contains("kernel is missing"), "{line}");
    let line = Bed::new("binary", b"kernel = '\xff'")
        .machine(&[])
        .unwrap_err();
    assert!(line.contains("byte 10 is not UTF-8"), "{line}");
    let bed = Bed::new("gone", b"");
    std::fs::remove_file(&bed.0).unwrap();
    let line = bed.machine(&[]).unwrap_err();
    assert!(line.starts_with("--config FILE: No such file"), "{line}");
    // Deep nesting is refused, not followed.
    assert!(read(&format!("kernel = {}", "[".repeat(100_000))).is_err());
    assert!(read(&format!("kernel = {}", "{a=".repeat(100_000))).is_err());
}

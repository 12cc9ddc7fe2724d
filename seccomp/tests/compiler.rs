//! The policy compiler: what it refuses, and that what it makes answers as the source says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by panicking.

#[path = "../compiler/mod.rs"]
mod compiler;

use bulkhead_seccomp::filter::AUDIT_ARCH;
use bulkhead_seccomp::policy::{self, allowed_syscalls, sock_filter};
use compiler::{Policy, Stage};
use proptest::prelude::*;

const ARCH: &str = "x86_64";

fn rule(lines: &str) -> String {
    format!("about = \"a policy under test\"\n[[rule]]\n{lines}\n")
}

fn refusal(text: &str) -> String {
    compiler::parse("t", text, ARCH)
        .expect_err("must be refused")
        .to_string()
}

fn parsed(text: &str) -> Policy {
    compiler::parse("t", text, ARCH).unwrap()
}

fn compiled(text: &str) -> Vec<sock_filter> {
    at_stage(text, Stage::Steady)
}

fn at_stage(text: &str, stage: Stage) -> Vec<sock_filter> {
    compiler::compile(&parsed(text), stage, ARCH)
        .unwrap()
        .into_iter()
        .map(|i| sock_filter {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect()
}

/// The kernel's part: runs a filter on one call, arguments known. Written apart from the
/// decoder that it is used to check, and only for what seccompiler emits.
fn run(filter: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![nr, arch, 0, 0];
    for arg in args {
        data.extend([arg as u32, (arg >> 32) as u32]);
    }
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let i = &filter[at];
        at += 1;
        match i.code {
            0x20 => a = data[i.k as usize / 4],
            0x54 => a &= i.k,
            0x05 => at += i.k as usize,
            0x15 => at += usize::from(if a == i.k { i.jt } else { i.jf }),
            0x06 => return i.k,
            code => panic!("seccompiler does not emit {code:#x}"),
        }
    }
}

fn answer(filter: &[sock_filter], syscall: i64, args: [u64; 6]) -> u32 {
    run(
        filter,
        AUDIT_ARCH.unwrap(),
        u32::try_from(syscall).unwrap(),
        args,
    )
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

#[test]
fn a_rule_without_a_reason_is_refused() {
    assert!(refusal(&rule("syscall = \"read\"")).contains("rule 1 (`read`): `why` is missing"));
    assert!(refusal(&rule("syscall = \"read\"\nwhy = \"\"")).contains("must be one line"));
    let two_lines = rule("syscall = \"read\"\nwhy = \"one line\\nand another\"");
    assert!(refusal(&two_lines).contains("must be one line"));
}

#[test]
fn what_the_format_does_not_have_is_refused() {
    for (text, says) in [
        (
            rule("syscall = \"read\"\nwhy = \"some reason\"\nbecause = 1"),
            "unknown field `because`",
        ),
        (
            rule("syscall = \"raed\"\nwhy = \"some reason\""),
            "(`raed`): there is no such system call",
        ),
        (
            rule("syscall = \"read\"\nwhy = \"some reason\"\nstage = \"late\""),
            "unknown variant `late`",
        ),
        (
            rule("syscall = \"read\"\nwhy = \"some reason\"\nerrno = \"EFUN\""),
            "errno `EFUN` is not known",
        ),
        (
            rule("syscall = \"read\"\nwhy = \"some reason\"\nargs.count = { eq = 1 }"),
            "no argument `count` is known (known: none)",
        ),
        (
            rule("syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { clear = \"PROT_EXE\" }"),
            "the name `PROT_EXE` is not known",
        ),
        (
            rule("syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { }"),
            "argument `prot`: give `eq`",
        ),
        (
            rule("syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { eq = 1, set = 2 }"),
            "argument `prot`: give `eq`",
        ),
        (
            rule("syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { mask = 1, eq = 2 }"),
            "outside the mask",
        ),
        (
            rule("syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { set = 4, clear = 4 }"),
            "both `set` and `clear`",
        ),
        (
            rule("syscall = \"ioctl\"\nwhy = \"some reason\"\nargs.cmd = { one_of = [] }"),
            "`one_of` is empty",
        ),
        (
            rule(
                "syscall = \"ioctl\"\nwhy = \"some reason\"\nargs.cmd = { one_of = [1, \"0x1\"] }",
            ),
            "listed twice",
        ),
        (
            rule("syscall = \"ioctl\"\nwhy = \"some reason\"\nargs.cmd = { eq = \"0x100000000\" }"),
            "does not fit into 32 bits",
        ),
        ("about = \"nothing at all\"".to_owned(), "no [[rule]]"),
    ] {
        let refusal = refusal(&text);
        assert!(refusal.contains(says), "{text}\nsaid: {refusal}");
        assert!(refusal.starts_with("policies/t.toml: "), "{refusal}");
    }
}

#[test]
fn a_rule_that_says_nothing_new_is_refused() {
    let one = "syscall = \"mmap\"\nwhy = \"some reason\"\n";
    for (first, second) in [
        ("", ""),
        ("", "args.prot = { clear = \"PROT_EXEC\" }\n"),
        (
            "args.prot = { clear = \"PROT_EXEC\" }\n",
            "args.prot = { clear = \"PROT_EXEC | PROT_WRITE\" }\n",
        ),
        ("", "stage = \"setup\"\n"),
    ] {
        let text = rule(&format!("{one}{first}\n[[rule]]\n{one}{second}"));
        assert!(refusal(&text).contains("drop it"), "{text}");
        let text = rule(&format!("{one}{second}\n[[rule]]\n{one}{first}"));
        assert!(refusal(&text).contains("drop it"), "{text}");
    }
    // Each of these says something that the other does not.
    parsed(&rule(&format!(
        "{one}args.prot = {{ eq = 1 }}\n[[rule]]\n{one}args.prot = {{ eq = 3 }}\n"
    )));
    parsed(&rule(&format!(
        "{one}args.prot = {{ eq = 1 }}\n[[rule]]\n{one}stage = \"setup\""
    )));
}

#[test]
fn an_unknown_architecture_is_refused_by_name() {
    let text = rule("syscall = \"read\"\nwhy = \"some reason\"");
    let refusal = compiler::parse("t", &text, "vax").unwrap_err().to_string();
    assert!(
        refusal.contains("no table of system calls for `vax`"),
        "{refusal}"
    );
}

#[test]
fn arguments_decide() {
    let filter = compiled(&rule(
        "syscall = \"mmap\"\nwhy = \"some reason\"\nargs.prot = { clear = \"PROT_EXEC\" }\nargs.flags = { set = \"MAP_SHARED\", only = \"MAP_NORESERVE\" }",
    ));
    let mmap = |prot: u64, flags: u64| answer(&filter, libc::SYS_mmap, [0, 1, prot, flags, 0, 0]);
    assert_eq!(mmap(3, 1), ALLOW);
    assert_eq!(mmap(3, 0x4001), ALLOW);
    assert_eq!(mmap(7, 1), KILL);
    assert_eq!(mmap(4, 1), KILL);
    assert_eq!(mmap(3, 0x4000), KILL, "MAP_SHARED must be set");
    assert_eq!(mmap(3, 0x11), KILL, "MAP_FIXED is not among the flags");
    assert_eq!(
        mmap(3, 1 << 40 | 1),
        KILL,
        "flags are a long: all of it counts"
    );
    assert_eq!(answer(&filter, libc::SYS_munmap, [0; 6]), KILL);
}

#[test]
fn of_an_int_the_upper_half_does_not_count() {
    let filter = compiled(&rule(
        "syscall = \"ioctl\"\nwhy = \"some reason\"\nargs.cmd = { one_of = [\"KVM_RUN\", \"FIONBIO\"] }\nargs.fd = { eq = -1 }",
    ));
    let ioctl = |fd: u64, cmd: u64| answer(&filter, libc::SYS_ioctl, [fd, cmd, 0, 0, 0, 0]);
    assert_eq!(ioctl(0xffff_ffff, 0xae80), ALLOW);
    assert_eq!(ioctl(u64::MAX, 0xdead_0000_0000_ae80), ALLOW);
    assert_eq!(ioctl(u64::MAX, 0x5421), ALLOW);
    assert_eq!(ioctl(u64::MAX, 0xae81), KILL);
    assert_eq!(ioctl(3, 0xae80), KILL);
}

#[test]
fn an_errno_rule_answers_before_the_list() {
    let text = "about = \"a policy under test\"
[[rule]]
syscall = \"clone3\"
errno = \"ENOSYS\"
why = \"glibc falls back to clone\"
[[rule]]
syscall = \"fcntl\"
args.cmd = { eq = \"F_GETFD\" }
errno = \"EPERM\"
why = \"asked, and never minded\"
[[rule]]
syscall = \"fcntl\"
args.cmd = { eq = \"F_GETFL\" }
why = \"some reason\"
";
    let filter = compiled(text);
    let errno = |e: i32| libc::SECCOMP_RET_ERRNO | e.unsigned_abs();
    assert_eq!(
        answer(&filter, libc::SYS_clone3, [7; 6]),
        errno(libc::ENOSYS)
    );
    let fcntl = |cmd: u64| answer(&filter, libc::SYS_fcntl, [0, cmd, 0, 0, 0, 0]);
    assert_eq!(fcntl(1), errno(libc::EPERM));
    assert_eq!(fcntl(3), ALLOW);
    assert_eq!(fcntl(4), KILL);
    assert_eq!(answer(&filter, libc::SYS_read, [0; 6]), KILL);
    // A call that only ever fails is not one that is allowed.
    assert_eq!(allowed_syscalls(&filter).unwrap(), [72]);
}

#[test]
fn set_up_rules_are_gone_from_the_steady_filter() {
    let text = rule(
        "syscall = \"read\"\nwhy = \"some reason\"\n[[rule]]\nsyscall = \"clone\"\nstage = \"setup\"\nwhy = \"some reason\"",
    );
    assert_eq!(
        allowed_syscalls(&at_stage(&text, Stage::Setup)).unwrap(),
        [0, 56]
    );
    assert_eq!(
        allowed_syscalls(&at_stage(&text, Stage::Steady)).unwrap(),
        [0]
    );
}

#[test]
fn what_the_outer_filter_would_kill_is_refused() {
    let outer = "syscall = \"mmap\"\nargs.prot = { clear = \"PROT_EXEC\" }\nwhy = \"some reason\"";
    let outer = compiler::parse("outer", &rule(outer), ARCH).unwrap();
    let against_outer = |lines: &str| {
        let text = format!("outer = \"outer\"\n{}", rule(lines));
        compiler::check_outers(&[parsed(&text), outer.clone()]).map_err(|e| e.to_string())
    };
    for (args, covered) in [
        ("args.prot = { clear = \"PROT_EXEC\" }", true),
        (
            "args.prot = { one_of = [1, 3] }\nargs.flags = { eq = 1 }",
            true,
        ),
        ("args.prot = { only = 3 }", true),
        ("errno = \"EPERM\"", true),
        ("args.prot = { one_of = [1, 7] }", false),
        ("args.flags = { eq = 1 }", false),
        ("", false),
    ] {
        let verdict = against_outer(&format!(
            "syscall = \"mmap\"\nwhy = \"some reason\"\n{args}"
        ));
        assert_eq!(verdict.is_ok(), covered, "{args}: {verdict:?}");
    }
    let refusal = against_outer("syscall = \"read\"\nwhy = \"some reason\"").unwrap_err();
    assert!(
        refusal.contains("`read`") && refusal.contains("policies/outer.toml"),
        "{refusal}"
    );

    let text = format!(
        "outer = \"nobody\"\n{}",
        rule("syscall = \"read\"\nwhy = \"some reason\"")
    );
    let refusal = compiler::check_outers(&[parsed(&text)]).unwrap_err();
    assert!(refusal.to_string().contains("no policies/nobody.toml"));
}

#[test]
fn a_policy_that_extends_another_has_its_rules_too() {
    let base = |lines: &str| compiler::parse("base", &rule(lines), ARCH).unwrap();
    let extended = |base: &Policy, lines: &str| {
        let text = format!("extends = \"base\"\n{}", rule(lines));
        let mut both = [parsed(&text), base.clone()];
        compiler::extend(&mut both)
            .map(|()| both[0].clone())
            .map_err(|e| e.to_string())
    };
    let read = base("syscall = \"read\"\nwhy = \"some reason\"");
    let write = "syscall = \"write\"\nwhy = \"some reason\"";
    let policy = extended(&read, write).unwrap();
    let calls: Vec<_> = policy.rules.iter().map(|r| r.syscall.as_str()).collect();
    assert_eq!(calls, ["read", "write"]);

    // A wider rule takes the place of the narrow one; one that says nothing new is refused.
    let narrow = "syscall = \"socket\"\nargs.domain = { eq = 1 }\nwhy = \"some reason\"";
    let wide = "syscall = \"socket\"\nwhy = \"some reason\"";
    assert_eq!(extended(&base(narrow), wide).unwrap().rules.len(), 1);
    let refusal = extended(&base(wide), narrow).unwrap_err();
    assert!(
        refusal.contains("base") && refusal.contains("drop it"),
        "{refusal}"
    );

    let mut alone = [parsed(&format!("extends = \"base\"\n{}", rule(write)))];
    let refusal = compiler::extend(&mut alone).unwrap_err().to_string();
    assert!(refusal.contains("no policies/base.toml"), "{refusal}");
}

#[test]
fn the_generated_source_has_one_static_for_each_policy() {
    let text = rule("syscall = \"read\"\nwhy = \"some reason\"");
    let policy = compiler::parse("bulkhead-x", &text, ARCH).unwrap();
    let source = compiler::generate(&[policy], ARCH).unwrap();
    assert!(
        source.contains("/// a policy under test\npub static BULKHEAD_X: Policy"),
        "{source}"
    );
}

/// `_IOC` of asm-generic/ioctl.h, for KVM's type.
fn ioctl(direction: u64, nr: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | nr
}

#[test]
fn kvm_numbers_are_made_from_kvm_structures() {
    use kvm_bindings as k;
    const NONE: u64 = 0;
    const WRITE: u64 = 1;
    const READ: u64 = 2;
    const BOTH: u64 = 3;
    for (name, direction, nr, size) in [
        ("KVM_GET_API_VERSION", NONE, 0x00, 0),
        ("KVM_CREATE_VM", NONE, 0x01, 0),
        (
            "KVM_GET_MSR_INDEX_LIST",
            BOTH,
            0x02,
            size_of::<k::kvm_msr_list>(),
        ),
        ("KVM_CHECK_EXTENSION", NONE, 0x03, 0),
        ("KVM_GET_VCPU_MMAP_SIZE", NONE, 0x04, 0),
        (
            "KVM_GET_SUPPORTED_CPUID",
            BOTH,
            0x05,
            size_of::<k::kvm_cpuid2>(),
        ),
        ("KVM_CREATE_VCPU", NONE, 0x41, 0),
        (
            "KVM_GET_DIRTY_LOG",
            WRITE,
            0x42,
            size_of::<k::kvm_dirty_log>(),
        ),
        (
            "KVM_SET_USER_MEMORY_REGION",
            WRITE,
            0x46,
            size_of::<k::kvm_userspace_memory_region>(),
        ),
        ("KVM_SET_TSS_ADDR", NONE, 0x47, 0),
        ("KVM_SET_IDENTITY_MAP_ADDR", WRITE, 0x48, 8),
        (
            "KVM_SET_USER_MEMORY_REGION2",
            WRITE,
            0x49,
            size_of::<k::kvm_userspace_memory_region2>(),
        ),
        ("KVM_CREATE_IRQCHIP", NONE, 0x60, 0),
        ("KVM_IRQ_LINE", WRITE, 0x61, size_of::<k::kvm_irq_level>()),
        (
            "KVM_SET_GSI_ROUTING",
            WRITE,
            0x6a,
            size_of::<k::kvm_irq_routing>(),
        ),
        ("KVM_IRQFD", WRITE, 0x76, size_of::<k::kvm_irqfd>()),
        (
            "KVM_CREATE_PIT2",
            WRITE,
            0x77,
            size_of::<k::kvm_pit_config>(),
        ),
        ("KVM_IOEVENTFD", WRITE, 0x79, size_of::<k::kvm_ioeventfd>()),
        ("KVM_SET_CLOCK", WRITE, 0x7b, size_of::<k::kvm_clock_data>()),
        ("KVM_GET_CLOCK", READ, 0x7c, size_of::<k::kvm_clock_data>()),
        ("KVM_RUN", NONE, 0x80, 0),
        ("KVM_GET_REGS", READ, 0x81, size_of::<k::kvm_regs>()),
        ("KVM_SET_REGS", WRITE, 0x82, size_of::<k::kvm_regs>()),
        ("KVM_GET_SREGS", READ, 0x83, size_of::<k::kvm_sregs>()),
        ("KVM_SET_SREGS", WRITE, 0x84, size_of::<k::kvm_sregs>()),
        ("KVM_GET_MSRS", BOTH, 0x88, size_of::<k::kvm_msrs>()),
        ("KVM_SET_MSRS", WRITE, 0x89, size_of::<k::kvm_msrs>()),
        (
            "KVM_SET_SIGNAL_MASK",
            WRITE,
            0x8b,
            size_of::<k::kvm_signal_mask>(),
        ),
        ("KVM_GET_FPU", READ, 0x8c, size_of::<k::kvm_fpu>()),
        ("KVM_SET_FPU", WRITE, 0x8d, size_of::<k::kvm_fpu>()),
        ("KVM_GET_LAPIC", READ, 0x8e, size_of::<k::kvm_lapic_state>()),
        (
            "KVM_SET_LAPIC",
            WRITE,
            0x8f,
            size_of::<k::kvm_lapic_state>(),
        ),
        ("KVM_SET_CPUID2", WRITE, 0x90, size_of::<k::kvm_cpuid2>()),
        ("KVM_GET_CPUID2", BOTH, 0x91, size_of::<k::kvm_cpuid2>()),
        ("KVM_GET_MP_STATE", READ, 0x98, size_of::<k::kvm_mp_state>()),
        (
            "KVM_SET_MP_STATE",
            WRITE,
            0x99,
            size_of::<k::kvm_mp_state>(),
        ),
        ("KVM_NMI", NONE, 0x9a, 0),
        (
            "KVM_GET_VCPU_EVENTS",
            READ,
            0x9f,
            size_of::<k::kvm_vcpu_events>(),
        ),
        (
            "KVM_SET_VCPU_EVENTS",
            WRITE,
            0xa0,
            size_of::<k::kvm_vcpu_events>(),
        ),
        (
            "KVM_GET_DEBUGREGS",
            READ,
            0xa1,
            size_of::<k::kvm_debugregs>(),
        ),
        (
            "KVM_SET_DEBUGREGS",
            WRITE,
            0xa2,
            size_of::<k::kvm_debugregs>(),
        ),
        ("KVM_GET_XSAVE", READ, 0xa4, size_of::<k::kvm_xsave>()),
        ("KVM_SET_XSAVE", WRITE, 0xa5, size_of::<k::kvm_xsave>()),
        ("KVM_GET_XCRS", READ, 0xa6, size_of::<k::kvm_xcrs>()),
        ("KVM_SET_XCRS", WRITE, 0xa7, size_of::<k::kvm_xcrs>()),
        ("KVM_GET_IRQCHIP", BOTH, 0x62, size_of::<k::kvm_irqchip>()),
        ("KVM_SET_IRQCHIP", READ, 0x63, size_of::<k::kvm_irqchip>()),
        ("KVM_SET_TSC_KHZ", NONE, 0xa2, 0),
        ("KVM_GET_TSC_KHZ", NONE, 0xa3, 0),
        (
            "KVM_ENABLE_CAP",
            WRITE,
            0xa3,
            size_of::<k::kvm_enable_cap>(),
        ),
        ("KVM_SIGNAL_MSI", WRITE, 0xa5, size_of::<k::kvm_msi>()),
        ("KVM_KVMCLOCK_CTRL", NONE, 0xad, 0),
    ] {
        let text = rule(&format!(
            "syscall = \"ioctl\"\nwhy = \"some reason\"\nargs.cmd = {{ eq = \"{name}\" }}"
        ));
        let value = parsed(&text).rules[0].tests[0].alternatives[0].value;
        assert_eq!(value, ioctl(direction, nr, size), "{name}: {value:#x}");
    }
}

fn a_policy() -> impl Strategy<Value = &'static policy::Policy> {
    prop::sample::select(policy::all())
}

/// Arguments near those that policies compare with, and any.
fn an_argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..64,
        prop::sample::select(vec![0xae80, 0x4020_ae76, 0x5421, 0x003d_0f00, u64::MAX]),
        any::<u64>(),
    ]
}

proptest! {
    /// What the decoder says can happen is what happens.
    #[test]
    fn the_decoder_foresees_every_answer(
        policy in a_policy(),
        nr in 0_u32..512,
        args in prop::array::uniform6(an_argument()),
    ) {
        let arch = AUDIT_ARCH.unwrap();
        for filter in [policy.steady, policy.setup] {
            let answer = run(filter, arch, nr, args);
            let foreseen = policy::verdict(filter, arch, nr).unwrap();
            prop_assert!(foreseen.actions().contains(&answer), "{} {nr}: {answer:#x}", policy.name);
        }
    }

    /// A filter read from another process may be anything.
    #[test]
    fn the_decoder_survives_any_program(
        program in prop::collection::vec(
            (any::<u16>().prop_map(|c| c & 0xff), any::<u8>(), any::<u8>(), prop_oneof![0_u32..64, any::<u32>()]),
            0..64,
        ),
    ) {
        let program: Vec<sock_filter> = program
            .into_iter()
            .map(|(code, jt, jf, k)| sock_filter { code, jt: jt % 8, jf: jf % 8, k })
            .collect();
        let _ = policy::verdict(&program, AUDIT_ARCH.unwrap(), 0);
    }
}

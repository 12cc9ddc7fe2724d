//! The names that a policy may use for an argument's value: the kernel's own, from its uapi
//! headers. Those that libc has are taken from it; KVM's ioctl numbers are written out, and
//! `tests/compiler.rs` compares them with the structures they are made from.

macro_rules! from_libc {
    ($($name:ident)*) => {
        // The constants come as i32, u32, i64 and u64; what the kernel sees is the bits.
        #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss, clippy::cast_lossless)]
        const FROM_LIBC: &[(&str, u64)] = &[$((stringify!($name), (libc::$name as i64 as u64) & mask(size_of_val(&libc::$name)))),*];
    };
}

const fn mask(bytes: usize) -> u64 {
    if bytes >= 8 {
        u64::MAX
    } else {
        u32::MAX as u64
    }
}

from_libc! {
    PROT_NONE PROT_READ PROT_WRITE PROT_EXEC
    MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS MAP_FIXED MAP_NORESERVE MAP_STACK MAP_GROWSDOWN
    MAP_LOCKED MAP_POPULATE MAP_NONBLOCK MAP_HUGETLB MAP_SHARED_VALIDATE MAP_SYNC
    MAP_FIXED_NOREPLACE MREMAP_MAYMOVE MREMAP_FIXED
    MADV_NORMAL MADV_DONTNEED MADV_FREE MADV_REMOVE MADV_DONTDUMP MADV_HUGEPAGE
    MADV_NOHUGEPAGE MADV_POPULATE_READ MADV_POPULATE_WRITE MADV_DONTFORK MADV_MERGEABLE
    MADV_COLLAPSE
    F_DUPFD F_DUPFD_CLOEXEC F_GETFD F_SETFD F_GETFL F_SETFL F_ADD_SEALS F_GET_SEALS
    F_GETLK F_SETLK F_OFD_SETLK F_OFD_GETLK FD_CLOEXEC F_SETPIPE_SZ
    O_RDONLY O_WRONLY O_RDWR O_CREAT O_PATH O_CLOEXEC O_NONBLOCK O_DIRECTORY O_NOFOLLOW
    AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_VSOCK
    SOCK_STREAM SOCK_SEQPACKET SOCK_DGRAM SOCK_CLOEXEC SOCK_NONBLOCK
    SOL_SOCKET SO_PEERCRED SO_PASSCRED SO_RCVTIMEO SO_SNDTIMEO SO_ERROR SO_TYPE SO_RCVBUF SO_SNDBUF
    MSG_NOSIGNAL MSG_DONTWAIT MSG_PEEK MSG_CMSG_CLOEXEC MSG_TRUNC MSG_WAITALL
    EFD_CLOEXEC EFD_NONBLOCK EFD_SEMAPHORE EPOLL_CLOEXEC EPOLL_CTL_ADD EPOLL_CTL_MOD EPOLL_CTL_DEL
    MFD_CLOEXEC MFD_ALLOW_SEALING MFD_HUGETLB MFD_NOEXEC_SEAL
    FALLOC_FL_PUNCH_HOLE FALLOC_FL_KEEP_SIZE FALLOC_FL_ZERO_RANGE
    CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_THREAD CLONE_SYSVSEM CLONE_SETTLS
    CLONE_PARENT_SETTID CLONE_CHILD_CLEARTID CLONE_CHILD_SETTID CLONE_PIDFD CLONE_VFORK
    CLONE_NEWNS CLONE_NEWUSER CLONE_NEWPID CLONE_NEWNET CLONE_NEWIPC CLONE_NEWUTS
    CLONE_NEWCGROUP CLONE_NEWTIME CLONE_UNTRACED CLONE_PTRACE CLONE_IO CLONE_PARENT
    FUTEX_PRIVATE_FLAG
    PR_SET_NAME PR_GET_NAME PR_SET_NO_NEW_PRIVS PR_SET_DUMPABLE PR_GET_DUMPABLE
    PR_SET_PDEATHSIG PR_CAPBSET_DROP PR_CAPBSET_READ PR_CAP_AMBIENT PR_CAP_AMBIENT_CLEAR_ALL
    PR_SET_SECCOMP PR_SET_SECUREBITS PR_GET_SECUREBITS PR_GET_NO_NEW_PRIVS PR_SET_KEEPCAPS PR_SET_VMA
    SECCOMP_SET_MODE_FILTER SECCOMP_FILTER_FLAG_TSYNC SECCOMP_FILTER_FLAG_NEW_LISTENER
    SECCOMP_GET_ACTION_AVAIL
    RLIMIT_NOFILE RLIMIT_CORE RLIMIT_FSIZE RLIMIT_NPROC RLIMIT_AS RLIMIT_MEMLOCK RLIMIT_STACK
    TCGETS TCSETS TCSETSW TCSETSF TIOCGWINSZ TIOCGPGRP TIOCGPTN TIOCSPTLCK FIONBIO FIONREAD FIOCLEX
    SIGKILL SIGTERM SIGINT SIGSYS SIGABRT SIGSEGV SIGBUS SIGPIPE
    AT_EMPTY_PATH AT_SYMLINK_NOFOLLOW AT_FDCWD AT_REMOVEDIR
    P_PID P_PIDFD P_ALL WNOHANG WEXITED WNOWAIT WSTOPPED
    CLOCK_MONOTONIC CLOCK_REALTIME CLOCK_BOOTTIME TFD_NONBLOCK TFD_CLOEXEC TFD_TIMER_ABSTIME
    MS_RDONLY MS_NOSUID MS_NODEV MS_NOEXEC MS_BIND MS_REC MS_PRIVATE MS_UNBINDABLE MS_SLAVE MS_REMOUNT
    MNT_DETACH UMOUNT_NOFOLLOW GRND_NONBLOCK RWF_DSYNC RWF_NOWAIT RWF_HIPRI RWF_SYNC
    SHUT_RD SHUT_WR SHUT_RDWR SIG_BLOCK SIG_UNBLOCK SIG_SETMASK
}

/// What libc does not have.
const WRITTEN_OUT: &[(&str, u64)] = &[
    // linux/io_uring.h
    ("IORING_ENTER_GETEVENTS", 1),
    ("IORING_ENTER_EXT_ARG", 1 << 3),
    ("IORING_ENTER_REGISTERED_RING", 1 << 4),
    ("IORING_REGISTER_FILES", 2),
    ("IORING_REGISTER_FILES_UPDATE", 6),
    ("IORING_REGISTER_RESTRICTIONS", 11),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("IORING_REGISTER_FILES2", 13),
    // linux/fs.h
    ("BLKROGET", 0x125e),
    ("BLKSECTGET", 0x1267),
    ("BLKSSZGET", 0x1268),
    ("BLKIOMIN", 0x1278),
    ("BLKIOOPT", 0x1279),
    ("BLKALIGNOFF", 0x127a),
    ("BLKPBSZGET", 0x127b),
    ("BLKSECDISCARD", 0x127d),
    ("BLKGETSIZE64", 0x8008_1272),
    ("SECCOMP_IOCTL_NOTIF_RECV", 0xc050_2100),
    ("SECCOMP_IOCTL_NOTIF_SEND", 0xc018_2101),
    // linux/futex.h, without FUTEX_PRIVATE_FLAG
    ("FUTEX_WAIT", 0),
    ("FUTEX_WAKE", 1),
    ("FUTEX_WAIT_BITSET", 9),
    ("FUTEX_WAKE_BITSET", 10),
    ("FUTEX_CLOCK_REALTIME", 256),
    // asm/prctl.h
    ("ARCH_SET_FS", 0x1002),
    ("ARCH_CET_STATUS", 0x3001),
    ("ARCH_SHSTK_DISABLE", 0x5002),
    ("ARCH_SHSTK_STATUS", 0x5005),
    // linux/landlock.h
    ("LANDLOCK_CREATE_RULESET_VERSION", 1),
    ("LANDLOCK_CREATE_RULESET_ERRATA", 2),
    // linux/if_tun.h
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNGETIFF", 0x8004_54d2),
    ("TUNSETSNDBUF", 0x4004_54d4),
    ("TUNSETVNETHDRSZ", 0x4004_54d8),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("TUNSETVNETLE", 0x4004_54dc),
    ("TUNSETCARRIER", 0x4004_54e2),
    // linux/vhost.h
    ("VHOST_SET_OWNER", 0xaf01),
    ("VHOST_GET_FEATURES", 0x8008_af00),
    ("VHOST_SET_FEATURES", 0x4008_af00),
    ("VHOST_SET_MEM_TABLE", 0x4008_af03),
    ("VHOST_SET_VRING_NUM", 0x4008_af10),
    ("VHOST_SET_VRING_ADDR", 0x4028_af11),
    ("VHOST_SET_VRING_BASE", 0x4008_af12),
    ("VHOST_GET_VRING_BASE", 0xc008_af12),
    ("VHOST_SET_VRING_KICK", 0x4008_af20),
    ("VHOST_SET_VRING_CALL", 0x4008_af21),
    ("VHOST_SET_VRING_ERR", 0x4008_af22),
    ("VHOST_NET_SET_BACKEND", 0x4008_af30),
    // linux/sockios.h
    ("SIOCGIFNAME", 0x8910),
    ("SIOCGIFMTU", 0x8921),
    // linux/kvm.h
    ("KVM_GET_API_VERSION", 0xae00),
    ("KVM_CREATE_VM", 0xae01),
    ("KVM_CHECK_EXTENSION", 0xae03),
    ("KVM_GET_VCPU_MMAP_SIZE", 0xae04),
    ("KVM_CREATE_VCPU", 0xae41),
    ("KVM_SET_TSS_ADDR", 0xae47),
    ("KVM_SET_IDENTITY_MAP_ADDR", 0x4008_ae48),
    ("KVM_CREATE_IRQCHIP", 0xae60),
    ("KVM_RUN", 0xae80),
    ("KVM_NMI", 0xae9a),
    ("KVM_SET_TSC_KHZ", 0xaea2),
    ("KVM_GET_TSC_KHZ", 0xaea3),
    ("KVM_KVMCLOCK_CTRL", 0xaead),
    ("KVM_CREATE_PIT2", 0x4040_ae77),
    ("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    ("KVM_SET_USER_MEMORY_REGION2", 0x40a0_ae49),
    ("KVM_GET_DIRTY_LOG", 0x4010_ae42),
    ("KVM_IRQ_LINE", 0x4008_ae61),
    ("KVM_SET_GSI_ROUTING", 0x4008_ae6a),
    ("KVM_IRQFD", 0x4020_ae76),
    ("KVM_IOEVENTFD", 0x4040_ae79),
    ("KVM_SIGNAL_MSI", 0x4020_aea5),
    ("KVM_ENABLE_CAP", 0x4068_aea3),
    ("KVM_GET_CLOCK", 0x8030_ae7c),
    ("KVM_SET_CLOCK", 0x4030_ae7b),
    ("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
    ("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
    ("KVM_GET_REGS", 0x8090_ae81),
    ("KVM_SET_REGS", 0x4090_ae82),
    ("KVM_GET_SREGS", 0x8138_ae83),
    ("KVM_SET_SREGS", 0x4138_ae84),
    ("KVM_GET_MSRS", 0xc008_ae88),
    ("KVM_SET_MSRS", 0x4008_ae89),
    ("KVM_SET_SIGNAL_MASK", 0x4004_ae8b),
    ("KVM_GET_FPU", 0x81a0_ae8c),
    ("KVM_SET_FPU", 0x41a0_ae8d),
    ("KVM_GET_LAPIC", 0x8400_ae8e),
    ("KVM_SET_LAPIC", 0x4400_ae8f),
    ("KVM_SET_CPUID2", 0x4008_ae90),
    ("KVM_GET_CPUID2", 0xc008_ae91),
    ("KVM_GET_MP_STATE", 0x8004_ae98),
    ("KVM_SET_MP_STATE", 0x4004_ae99),
    ("KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
    ("KVM_SET_VCPU_EVENTS", 0x4040_aea0),
    ("KVM_GET_DEBUGREGS", 0x8080_aea1),
    ("KVM_SET_DEBUGREGS", 0x4080_aea2),
    ("KVM_GET_XSAVE", 0x9000_aea4),
    ("KVM_SET_XSAVE", 0x5000_aea5),
    ("KVM_GET_XCRS", 0x8188_aea6),
    ("KVM_SET_XCRS", 0x4188_aea7),
    ("KVM_GET_IRQCHIP", 0xc208_ae62),
    ("KVM_SET_IRQCHIP", 0x8208_ae63),
    ("KVM_PRE_FAULT_MEMORY", 0xc040_aed5),
];

/// The value of `A | B | 0x10`.
pub fn resolve(text: &str) -> Result<u64, String> {
    text.split('|').map(str::trim).try_fold(0, |sum, word| {
        let value = match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16)
                .map_err(|e| format!("`{word}` is not a hexadecimal number: {e}"))?,
            None => named(word)?,
        };
        Ok(sum | value)
    })
}

fn named(word: &str) -> Result<u64, String> {
    FROM_LIBC
        .iter()
        .chain(WRITTEN_OUT)
        .find(|(name, _)| *name == word)
        .map(|(_, value)| *value)
        .ok_or_else(|| {
            format!("the name `{word}` is not known: mend it, or add it to compiler/constants.rs")
        })
}

/// The number of an errno that a rule may answer with.
pub fn errno(name: &str) -> Result<u32, String> {
    let value = match name {
        "EPERM" => libc::EPERM,
        "EACCES" => libc::EACCES,
        "ENOSYS" => libc::ENOSYS,
        "ENOMEM" => libc::ENOMEM,
        "EINVAL" => libc::EINVAL,
        "EINTR" => libc::EINTR,
        _ => {
            return Err(format!(
                "errno `{name}` is not known: use EPERM, EACCES, ENOSYS, ENOMEM, EINVAL or EINTR"
            ));
        }
    };
    u32::try_from(value).map_err(|e| e.to_string())
}

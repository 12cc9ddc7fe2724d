//! Names of capability sets (capabilities(7)). Called by the audit only.

/// Names of <linux/capability.h>, from 0.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// A set as a list of names; "all" and "none" for those.
pub fn capability_names(set: u64) -> String {
    let known = CAPABILITIES.len().min(64);
    if set == 0 {
        return "none".into();
    }
    if (0..known).all(|bit| set >> bit & 1 == 1) {
        return "all".into();
    }
    (0..64)
        .filter(|bit| set >> bit & 1 == 1)
        .map(|bit| {
            CAPABILITIES
                .get(bit)
                .map_or_else(|| bit.to_string(), |name| (*name).to_owned())
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_sets_have_names() {
        assert_eq!(capability_names(0), "none");
        assert_eq!(capability_names(0x1ff_ffff_ffff), "all");
        assert_eq!(
            capability_names(1 << 21 | 1 << 1 | 1 << 50),
            "dac_override,sys_admin,50"
        );
    }
}

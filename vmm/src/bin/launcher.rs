//! `bulkhead-launcher`: the parent of every device process of one VM. Everything it does is
//! in `bulkhead_vmm::launcher`; only `bulkhead` starts it.

fn main() -> std::process::ExitCode {
    let status = bulkhead_vmm::launcher::launcher_main();
    // Not by returning: std's clean-up makes system calls that the policy does not list.
    bulkhead_seccomp::confine::exit(status)
}

//! What differs between guest architectures. Nothing outside assumes x86.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

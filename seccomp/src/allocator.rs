#![allow(unsafe_code)] // mallopt(3), which std does not offer.
//! malloc under a filter. glibc's malloc gives threads arenas of their own; once there are eight it
//! counts the CPUs, and when it gives back the end of one it asks whether the kernel overcommits:
//! for both it opens files, and a confined process dies of that. They also grow by mprotect(2),
//! which devices' filters lack. The first arena, whose end is brk(2)'s, does none of it.
//!
//! Part of every confinement (`confine`), while the process has one thread.

/// Has all threads share one arena; false when the C library would not.
pub fn bind_arenas() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes integers; the process has one thread, so that nobody is in malloc.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    {
        true
    }
}

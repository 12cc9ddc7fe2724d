#![allow(unsafe_code)] // mallopt(3), which std does not offer.
//! malloc under a filter. glibc's malloc gives threads arenas of their own, and once there are
//! eight it counts the CPUs, for which it opens files: a confined process dies of that, the more
//! surely the more threads it has. Where the number of arenas is bound it never counts.
//!
//! Part of every confinement (`confine`), while the process has one thread.

/// Most arenas, unless it is said otherwise: threads that allocate are few, and share.
pub const ARENAS: libc::c_int = 4;

/// Binds the number of malloc's arenas; false when the C library would not.
#[cfg_attr(not(target_env = "gnu"), expect(unused_variables))]
pub fn bind_arenas(most: libc::c_int) -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes integers; the process has one thread, so that nobody is in malloc.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, most) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    {
        true
    }
}

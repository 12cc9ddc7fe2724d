//! Starting the VMM's helper threads (`vp-N`, `serial`): named, and with a hook that the
//! manager gives (the thread's seccomp filter) run on the new thread before anything else
//! may rely on it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// Runs once on a new thread after its privileged set-up and before its work.
pub type ThreadHook = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// How long a new thread may take to report.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A hook that does nothing.
pub fn no_hook() -> ThreadHook {
    Arc::new(|| Ok(()))
}

/// Starts `body` on a thread called `name` once `prepare` and then `hook` have succeeded
/// there; reports their error here.
pub(crate) fn spawn(
    name: String,
    hook: ThreadHook,
    prepare: impl FnOnce() -> io::Result<()> + Send + 'static,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (report, reported) = mpsc::sync_channel(1);
    let handle = Builder::new().name(name).spawn(move || {
        let result = prepare().and_then(|()| hook());
        let ready = result.is_ok();
        let _ = report.send(result);
        drop(report);
        if ready {
            body();
        }
    })?;
    match reported.recv_timeout(START_TIMEOUT) {
        Ok(Ok(())) => Ok(handle),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_fails_keeps_the_body_from_running() {
        let hook: ThreadHook = Arc::new(|| Err(io::ErrorKind::PermissionDenied.into()));
        let error = spawn("t".into(), hook, || Ok(()), || panic!("ran"))
            .err()
            .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let (sender, receiver) = mpsc::channel();
        let body = move || {
            sender
                .send(std::thread::current().name().map(str::to_owned))
                .unwrap()
        };
        spawn("vp-7".into(), no_hook(), || Ok(()), body)
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(receiver.recv().unwrap().as_deref(), Some("vp-7"));
    }
}

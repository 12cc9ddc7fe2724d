//! A device binary that is no good, for live updates that must fail. A device process has no
//! environment and its arguments are another one's, so what is wrong with it is written into the
//! program itself: a test copies this file and overwrites the text after the mark.
//!
//! - `exit`: ends at once.
//! - `hang`: never answers.
//! - `version`: speaks another version of the control protocol.
//! - `kind`: is another kind of device.
//! - `rings`: says all that is right, and nothing on its vhost-user channel.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_proto::device::{HelloRequest, HelloResponse};
use bulkhead_proto::server::{CONTROL_MAX_FRAME, ControlServer, decode, encode};
use bulkhead_runtime::sys;

/// The mark, and what is wrong.
static FAULT: [u8; 48] = *b"BULKHEAD-FALSE-DEVICE:exit                      ";

fn fault() -> &'static str {
    // Not to be known when this is compiled.
    let text = std::hint::black_box(&FAULT);
    let text = std::str::from_utf8(text).unwrap_or_default();
    text.split_once(':').map_or("", |(_, fault)| fault.trim())
}

fn main() -> std::process::ExitCode {
    let fault = fault();
    if fault == "exit" {
        return std::process::ExitCode::from(3);
    }
    let Ok(control) = sys::take_inherited(3) else {
        return std::process::ExitCode::from(4);
    };
    let Ok(waiting) = control.try_clone() else {
        return std::process::ExitCode::from(4);
    };
    serve(control, &waiting, fault);
    std::process::ExitCode::SUCCESS
}

fn serve(control: OwnedFd, waiting: &OwnedFd, fault: &str) {
    let mut server = ControlServer::new(control, CONTROL_MAX_FRAME);
    loop {
        let _ = sys::wait_readable(&waiting.as_fd(), 1000);
        if fault == "hang" {
            // Its channel is readable for ever.
            let _ = sys::poll(&mut [], 1000);
            continue;
        }
        let served = server.on_readable(&mut |_, method, body| {
            if method != "Hello" {
                return Ok(Vec::new());
            }
            let request: HelloRequest = decode(body)?;
            let mut hello = HelloResponse::new();
            hello.kind = if fault == "kind" { "tap" } else { "blk" }.to_owned();
            hello.version = "9.9.9".to_owned();
            hello.protocol = if fault == "version" { 99 } else { 1 };
            hello.incarnation = request.incarnation;
            encode(&hello)
        });
        if served.is_err() {
            return;
        }
    }
}

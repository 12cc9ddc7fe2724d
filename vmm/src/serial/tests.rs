//! The port with real descriptors at its other side.

use super::*;
use crate::threads::no_hook;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const LONG: Duration = Duration::from_secs(60);
const DATA: u64 = 0;
const IER: u64 = 1;
const LSR: u64 = 5;

fn print(serial: &Serial, text: &[u8]) {
    text.iter().for_each(|byte| serial.write(DATA, &[*byte]));
}

/// Reads the receive register until `len` bytes have come.
fn receive(serial: &Serial, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let mut status = [0];
        serial.read(LSR, &mut status);
        if status[0] & 1 != 0 {
            let mut byte = [0];
            serial.read(DATA, &mut byte);
            bytes.push(byte[0]);
        } else {
            std::thread::yield_now();
        }
    }
    bytes
}

#[test]
fn what_the_guest_prints_reaches_a_pipe_and_stop_drains_it() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let serial = Serial::new(
        SerialBackend::Stdio {
            input: None,
            output: writer.into(),
        },
        &no_hook(),
    )
    .unwrap();
    print(&serial, b"Linux version 6.12\n");
    assert!(serial.stop(LONG));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "Linux version 6.12\n");
    assert_eq!(serial.stats().bytes_out, 19);
    assert_eq!(serial.stats().dropped_out, 0);
}

#[test]
fn input_longer_than_the_fifo_arrives_whole_and_interrupts() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    let serial = Serial::new(
        SerialBackend::Stdio {
            input: Some(reader.into()),
            output: null.into(),
        },
        &no_hook(),
    )
    .unwrap();
    serial.write(IER, &[1]);
    let text: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
    writer.write_all(&text).unwrap();
    drop(writer);
    assert_eq!(receive(&serial, text.len()), text);
    assert!(serial.irq.read().is_ok(), "the irqfd was signalled");
    assert_eq!(serial.stats().bytes_in, 1000);
    assert!(serial.stop(LONG));
}

#[test]
fn a_socket_serves_one_client_after_another_and_keeps_the_last_words() {
    let path = std::env::temp_dir().join(format!("bulkhead-serial-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let serial = Serial::new(SerialBackend::Listener(listener.into()), &no_hook()).unwrap();
    print(&serial, b"before");
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        let expected: &[u8] = if round == 0 { b"before" } else { b"again" };
        let mut text = vec![0; expected.len()];
        client.read_exact(&mut text).unwrap();
        assert_eq!(text, expected);
        client.write_all(b"hello").unwrap();
        assert_eq!(receive(&serial, 5), b"hello");
        drop(client);
        // Printed while nobody, or the client that is leaving, is there: wait for the latter.
        while serial.output.is_attached() {
            std::thread::yield_now();
        }
        print(&serial, b"again");
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_reader_that_stands_still_does_not_stop_the_guest() {
    let (reader, writer) = std::io::pipe().unwrap();
    let serial = Serial::new(
        SerialBackend::Stdio {
            input: None,
            output: writer.into(),
        },
        &no_hook(),
    )
    .unwrap();
    // More than the pipe and the buffer hold together: this returns, and bytes are lost.
    print(&serial, &vec![b'x'; 1 << 20]);
    assert!(serial.stats().dropped_out > 0);
    assert!(!serial.stop(Duration::ZERO));
    drop(reader);
}

#[test]
fn a_closed_reader_costs_only_bytes() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let serial = Serial::new(
        SerialBackend::Stdio {
            input: None,
            output: writer.into(),
        },
        &no_hook(),
    )
    .unwrap();
    print(&serial, &vec![b'x'; 200_000]);
    assert!(serial.stop(LONG));
    assert_eq!(serial.stats().bytes_out, 0);
    assert_eq!(serial.stats().dropped_out, 200_000);
}

//! Unary calls: answers, refusals, deadlines.

use std::io::{Read, Write};
use std::time::Duration;

use bulkhead_proto::machine::{
    BootRequest, CreateRequest, DevicesRequest, InfoRequest, PauseRequest, ShutdownRequest,
};
use bulkhead_proto::stubs::{blocking, ttrpc};
use bulkhead_proto::{Code, RpcStatus};

use super::*;

#[test]
fn the_reference_blocking_client_calls_every_unary_method() {
    let fixture = Fixture::prompt();
    let client = ttrpc::Client::connect(&fixture.address()).unwrap();
    let machine = blocking::machine_ttrpc::MachineClient::new(client);
    let context = || ttrpc::context::with_duration(LONG);
    assert_eq!(
        machine
            .info(context(), &InfoRequest::new())
            .unwrap()
            .version,
        "test"
    );
    assert_eq!(
        machine
            .devices(context(), &DevicesRequest::new())
            .unwrap()
            .devices
            .len(),
        3
    );
    machine.boot(context(), &BootRequest::new()).unwrap();
    machine.resume(context(), &Default::default()).unwrap();
    machine
        .shutdown(context(), &ShutdownRequest::new())
        .unwrap();
    let Err(ttrpc::Error::RpcStatus(status)) = machine.pause(context(), &PauseRequest::new())
    else {
        panic!("the machine refuses to pause")
    };
    assert_eq!(status.code(), ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(status.message(), "boot it first");
    let Err(ttrpc::Error::RpcStatus(status)) = machine.create(context(), &CreateRequest::new())
    else {
        panic!("a configuration is missing")
    };
    assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
}

#[test]
fn two_hundred_calls_at_once_on_one_connection_are_all_answered() {
    let fixture = Fixture::prompt();
    let client = ttrpc::Client::connect(&fixture.address()).unwrap();
    let machine = blocking::machine_ttrpc::MachineClient::new(client);
    let threads: Vec<_> = (0..200)
        .map(|_| {
            let machine = machine.clone();
            std::thread::spawn(move || {
                machine
                    .info(ttrpc::context::with_duration(LONG), &InfoRequest::new())
                    .unwrap()
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap().version, "test");
    }
}

#[test]
fn an_answer_may_come_from_another_thread_and_in_another_order() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream
        .write_all(&[request(1, "Boot"), request(3, "Info")].concat())
        .unwrap();
    let (boot, boot_reply) = requests.recv_timeout(LONG).unwrap();
    let (info, info_reply) = requests.recv_timeout(LONG).unwrap();
    assert_eq!((boot, info), (ApiRequest::Boot, ApiRequest::Info));
    info_reply.complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut stream), (3, Ok(())));
    boot_reply.complete(Err(RpcStatus::failed_precondition("no")));
    assert_eq!(answer(&mut stream), (1, Err(Code::FailedPrecondition)));
}

#[test]
fn a_reply_that_is_dropped_says_that_the_machine_is_gone() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    drop(requests.recv_timeout(LONG).unwrap());
    assert_eq!(answer(&mut stream), (1, Err(Code::Aborted)));
}

#[test]
fn a_deadline_is_kept_by_the_server_and_the_late_answer_meets_nobody() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    let nanos = i64::try_from(SHORT.as_nanos()).unwrap();
    stream
        .write_all(&request_with(1, "Boot", &[], nanos))
        .unwrap();
    let (_, late) = requests.recv_timeout(LONG).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::DeadlineExceeded)));
    assert!(late.is_abandoned());
    // The same stream id again: the old answer must not be taken for the new one's.
    stream.write_all(&request(1, "Pause")).unwrap();
    let (_, current) = requests.recv_timeout(LONG).unwrap();
    assert!(!current.is_abandoned());
    late.complete(Ok(ApiResponse::Done));
    current.complete(Err(RpcStatus::failed_precondition("the right one")));
    assert_eq!(answer(&mut stream), (1, Err(Code::FailedPrecondition)));
}

#[test]
fn the_server_has_a_limit_of_its_own_on_a_calls_time() {
    let limits = Limits {
        call_time: SHORT,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    assert_eq!(answer(&mut stream), (1, Err(Code::DeadlineExceeded)));
    drop(requests);
}

#[test]
fn a_client_that_hangs_up_abandons_its_calls() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    let (_, reply) = requests.recv_timeout(LONG).unwrap();
    drop(stream);
    while !reply.is_abandoned() {
        std::thread::sleep(Duration::from_millis(1));
    }
    reply.complete(Ok(ApiResponse::Done));
    drop(requests);
}

#[test]
fn a_client_may_close_its_writing_half_and_still_gets_its_answer() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let mut stream = fixture.connect();
    stream.write_all(&request(1, "Boot")).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    requests
        .recv_timeout(LONG)
        .unwrap()
        .1
        .complete(Ok(ApiResponse::Done));
    assert_eq!(answer(&mut stream), (1, Ok(())));
    assert_eq!(
        stream.read(&mut [0]).unwrap(),
        0,
        "then the server closes too"
    );
}

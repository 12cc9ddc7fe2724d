//! `vmservice.VM` on the same server: what differs from `bulkhead.v1.Machine`.

use bulkhead_proto::VM_SERVICE;
use bulkhead_proto::machine::RemoveDeviceResponse;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::{PropertiesVMRequest, PropertiesVMResponse, VMState};

use super::*;

fn plain(client: &mut BlockingClient, method: &str) -> Result<Empty, ClientError> {
    client.call(VM_SERVICE, method, &Empty::new(), LONG)
}

#[test]
fn a_call_for_the_machines_end_has_no_limit_but_the_clients() {
    let limits = Limits {
        call_time: SHORT,
        ..Limits::default()
    };
    let (fixture, requests) = Fixture::manual(limits);
    let mut client = fixture.client();
    assert_eq!(
        code_of(plain(&mut client, "PauseVM")),
        Code::DeadlineExceeded
    );
    let machine = std::thread::spawn(move || {
        let (pause, _late) = requests.recv().unwrap();
        let (wait, reply) = requests.recv().unwrap();
        std::thread::sleep(SHORT * 4);
        assert!(!reply.is_abandoned());
        reply.complete(Ok(ApiResponse::Done));
        (pause, wait)
    });
    plain(&mut client, "WaitVM").unwrap();
    let asked = machine.join().unwrap();
    assert_eq!(asked, (ApiRequest::Pause, ApiRequest::Wait));
    let mut brief = fixture.client();
    let empty = Empty::new();
    let answer: Result<Empty, _> = brief.call(VM_SERVICE, "WaitVM", &empty, SHORT);
    assert!(answer.is_err(), "the client's own limit holds");
}

#[test]
fn answers_are_empty_but_for_those_that_are_not() {
    let (fixture, requests) = Fixture::manual(Limits::default());
    let machine = std::thread::spawn(move || {
        let (_, reply) = requests.recv().unwrap();
        let mut removed = RemoveDeviceResponse::new();
        removed.operation = 7;
        reply.complete(Ok(ApiResponse::DeviceRemoved(removed)));
        let (request, reply) = requests.recv().unwrap();
        let mut properties = PropertiesVMResponse::new();
        properties.state = VMState::RUNNING.into();
        reply.complete(Ok(ApiResponse::VmProperties(Box::new(properties))));
        request
    });
    let mut client = fixture.client();
    let nothing = plain(&mut client, "TeardownVM").unwrap();
    let unknown = nothing.special_fields.unknown_fields();
    assert_eq!(unknown.iter().count(), 0, "the answer was not empty");
    let request = PropertiesVMRequest::new();
    let properties: PropertiesVMResponse = client
        .call(VM_SERVICE, "PropertiesVM", &request, LONG)
        .unwrap();
    assert_eq!(properties.state, VMState::RUNNING.into());
    let asked = machine.join().unwrap();
    let none = ApiRequest::Properties {
        memory: false,
        processor: false,
    };
    assert_eq!(asked, none);
}

#[test]
fn a_refusal_of_the_managers_is_in_this_services_words() {
    let fixture = Fixture::new(Prompt, Limits::default(), EventLog::new());
    let refused = plain(&mut fixture.client(), "PauseVM").unwrap_err();
    let ClientError::Status(status) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(status.message, "call ResumeVM first");
}

#[test]
fn its_client_is_not_closed_to_make_room() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let fixture = Fixture::new(Prompt, limits, EventLog::new());
    let mut kata = fixture.client();
    plain(&mut kata, "ResumeVM").unwrap();
    for _ in 0..8 {
        // Each takes the place of the one before.
        let mut other = fixture.client();
        info(&mut other).unwrap();
        std::mem::forget(other);
    }
    plain(&mut kata, "ResumeVM").unwrap();
}

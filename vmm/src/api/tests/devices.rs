//! The methods that name one device: what reaches the manager, what is refused before, and
//! what the answers look like on the wire.

use bulkhead_proto::common::QueueStats;
use bulkhead_proto::machine::{
    DeviceStatsRequest, DeviceStatsResponse, DrainDeviceRequest, DrainDeviceResponse,
    ResumeDeviceRequest, ResumeDeviceResponse, UpdateDiskRequest, UpdateDiskResponse,
    UpdateNetRequest, UpdateNetResponse, update_net_request::Link,
};
use bulkhead_proto::protobuf::{EnumOrUnknown, Message};

use super::*;

/// A machine that answers at once and tells the test what it was asked.
struct Disk(Mutex<mpsc::Sender<ApiRequest>>);

impl MachineService for Disk {
    fn submit(&self, request: ApiRequest, reply: ReplyHandle) {
        self.0.lock().unwrap().send(request.clone()).unwrap();
        reply.complete(match request {
            ApiRequest::DeviceStats { id } => {
                let mut stats = DeviceStatsResponse::new();
                stats.id = id;
                let mut queue = QueueStats::new();
                queue.latency_us_log2 = vec![1, 2, 3];
                stats.queues.push(queue);
                Ok(ApiResponse::DeviceStats(Box::new(stats)))
            }
            ApiRequest::UpdateDisk(update) => {
                let mut disk = UpdateDiskResponse::new();
                disk.size_bytes = update.size_bytes;
                Ok(ApiResponse::DiskUpdated(disk))
            }
            _ => Ok(ApiResponse::Done),
        });
    }
}

struct Bed {
    client: BlockingClient,
    asked: mpsc::Receiver<ApiRequest>,
    _server: Fixture,
}

fn bed() -> Bed {
    let (sender, asked) = mpsc::channel();
    let server = Fixture::new(Disk(Mutex::new(sender)), Limits::default(), EventLog::new());
    Bed {
        client: server.client(),
        asked,
        _server: server,
    }
}

impl Bed {
    fn call<Resp: Message>(
        &mut self,
        method: &str,
        request: &impl Message,
    ) -> Result<Resp, ClientError> {
        self.client.call(MACHINE_SERVICE, method, request, LONG)
    }

    /// The refusal's line; the manager was not asked.
    fn refused(&mut self, method: &str, request: &impl Message) -> String {
        match self.call::<UpdateNetResponse>(method, request) {
            Err(ClientError::Status(status)) => {
                assert_eq!(status.code, Code::InvalidArgument);
                assert!(self.asked.try_recv().is_err(), "it reached the manager");
                status.message
            }
            other => panic!("{other:?}"),
        }
    }
}

fn disk(size: u64) -> UpdateDiskRequest {
    let mut request = UpdateDiskRequest::new();
    request.id = "root".into();
    request.size_bytes = size;
    request
}

fn net() -> UpdateNetRequest {
    let mut request = UpdateNetRequest::new();
    request.id = "n0".into();
    request
}

#[test]
fn each_method_reaches_the_manager_and_its_answer_comes_back() {
    let mut bed = bed();
    let mut request = DeviceStatsRequest::new();
    request.id = "root".into();
    let stats: DeviceStatsResponse = bed.call("DeviceStats", &request).unwrap();
    assert_eq!(stats.id, "root");
    assert_eq!(stats.queues[0].latency_us_log2, [1, 2, 3]);

    let grown: UpdateDiskResponse = bed.call("UpdateDisk", &disk(1 << 20)).unwrap();
    assert_eq!(grown.size_bytes, 1 << 20);

    let mut update = net();
    update.link = Link::DOWN.into();
    let _: UpdateNetResponse = bed.call("UpdateNet", &update).unwrap();

    let mut request = DrainDeviceRequest::new();
    request.id = "root".into();
    let _: DrainDeviceResponse = bed.call("DrainDevice", &request).unwrap();
    request.timeout_ms = 600_000;
    let _: DrainDeviceResponse = bed.call("DrainDevice", &request).unwrap();
    let mut request = ResumeDeviceRequest::new();
    request.id = "root".into();
    let _: ResumeDeviceResponse = bed.call("ResumeDevice", &request).unwrap();

    let id = || "root".to_owned();
    let drain = |seconds| ApiRequest::DrainDevice {
        id: id(),
        timeout: Duration::from_secs(seconds),
    };
    let expected = [
        ApiRequest::DeviceStats { id: id() },
        ApiRequest::UpdateDisk(Box::new(disk(1 << 20))),
        ApiRequest::UpdateNet(Box::new(update)),
        drain(30),
        drain(600),
        ApiRequest::ResumeDevice { id: id() },
    ];
    assert_eq!(bed.asked.try_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn a_device_must_be_named() {
    let mut bed = bed();
    for id in ["", "../x", "a b", "x\x1b", &"x".repeat(33)] {
        let mut request = DeviceStatsRequest::new();
        request.id = id.into();
        for method in ["DeviceStats", "ResumeDevice"] {
            let line = bed.refused(method, &request);
            assert!(line.starts_with("id is ") && !line.contains(char::is_control));
        }
        let mut request = disk(512);
        request.id = id.into();
        assert!(bed.refused("UpdateDisk", &request).starts_with("id is "));
        let mut request = DrainDeviceRequest::new();
        request.id = id.into();
        assert!(bed.refused("DrainDevice", &request).starts_with("id is "));
    }
}

#[test]
fn a_change_that_makes_no_sense_is_refused_before_anything_is_done() {
    let mut bed = bed();
    assert!(
        bed.refused("UpdateDisk", &disk(0))
            .contains("nothing to change")
    );
    assert!(
        bed.refused("UpdateDisk", &disk(513))
            .starts_with("size_bytes is 513")
    );
    assert!(
        bed.refused("UpdateDisk", &disk(u64::MAX))
            .starts_with("size_bytes is")
    );
    let mut request = disk(0);
    let bytes = request
        .limits
        .mut_or_insert_default()
        .bytes
        .mut_or_insert_default();
    bytes.burst = 5;
    assert!(
        bed.refused("UpdateDisk", &request)
            .starts_with("limits.bytes.burst")
    );
    let mut request = disk(512);
    request
        .mut_special_fields()
        .mut_unknown_fields()
        .add_varint(9, 1);
    assert!(bed.refused("UpdateDisk", &request).contains("field 9"));

    assert!(
        bed.refused("UpdateNet", &net())
            .contains("nothing to change")
    );
    let mut request = net();
    request.link = EnumOrUnknown::from_i32(3);
    assert!(bed.refused("UpdateNet", &request).starts_with("link is 3"));
    let mut request = net();
    let packets = request
        .from_guest
        .mut_or_insert_default()
        .packets
        .mut_or_insert_default();
    packets.burst = 5;
    assert!(
        bed.refused("UpdateNet", &request)
            .starts_with("from_guest.packets")
    );

    let mut request = DrainDeviceRequest::new();
    request.id = "root".into();
    request.timeout_ms = 600_001;
    assert!(
        bed.refused("DrainDevice", &request)
            .starts_with("timeout_ms is 600001")
    );
}

#[test]
fn limits_may_be_lifted() {
    let mut bed = bed();
    let mut request = disk(0);
    request.limits = Some(Default::default()).into();
    let _: UpdateDiskResponse = bed.call("UpdateDisk", &request).unwrap();
    assert_eq!(
        bed.asked.try_recv().unwrap(),
        ApiRequest::UpdateDisk(Box::new(request))
    );
}

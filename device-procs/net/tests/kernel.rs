//! Given a host with vhost-net (the nested one has it): the kernel moves the frames, and this
//! process sets it up, stops it and keeps the control queue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::time::Duration;

use bulkhead_net::features as f;
use bulkhead_net::tap::Tap;
use bulkhead_proto::common::{NetLimits, TokenBucket};
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{
    DrainRequest, DrainResponse, HealthRequest, HealthResponse, HelloRequest, HelloResponse,
    NetUpdate, ResumeRequest, ResumeResponse, ShutdownRequest, ShutdownResponse, StatsRequest,
    StatsResponse, UpdateRequest, UpdateResponse, update_request,
};
use bulkhead_proto::protobuf::MessageField;
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};
use support::*;
use vhost::VhostBackend;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PLAIN: [u8; HEADER] = [0; HEADER];

fn vhost_net(pairs: u16) -> Option<Vec<File>> {
    if !isolated() {
        return None;
    }
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")
    };
    match (0..pairs).map(|_| open()).collect() {
        Ok(files) => Some(files),
        Err(e) => {
            eprintln!("skipped: /dev/vhost-net: {e}");
            None
        }
    }
}

struct Bed {
    net: Net,
    client: BlockingClient,
    vm: Vm,
    pairs: usize,
}

impl Bed {
    fn new(pairs: u16) -> Option<Self> {
        let files = vhost_net(pairs)?;
        let tap = Tap::attach("t0", pairs, None).unwrap();
        up("t0");
        let (net, control, vhost) = Net::inherit_with(&tap, &files, &[]);
        let client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut vm = Vm::over(vhost, 2 * pairs + 1, |o| o);
        vm.start();
        Some(Self {
            net,
            client,
            vm,
            pairs: usize::from(pairs),
        })
    }

    fn update(&mut self, update: NetUpdate) -> Result<UpdateResponse, String> {
        let mut request = UpdateRequest::new();
        request.kind = Some(update_request::Kind::Net(update));
        self.client
            .call(DEVICE_SERVICE, "Update", &request, PATIENCE)
            .map_err(|e| e.to_string())
    }

    fn link(&mut self, link: Link) {
        let mut update = NetUpdate::new();
        update.link = link.into();
        self.update(update).unwrap();
    }

    fn stats(&mut self) -> StatsResponse {
        self.client
            .call(DEVICE_SERVICE, "Stats", &StatsRequest::new(), PATIENCE)
            .unwrap()
    }

    /// A frame each way.
    fn talk(&mut self, wire: &Wire, seed: u8) {
        let out = ether(PEER, MAC_BYTES, 1514, seed);
        self.vm.send(1, &PLAIN, &out);
        assert_eq!(wire.receive(), out);
        let back = ether(MAC_BYTES, PEER, 1000, seed);
        wire.send(&back);
        assert_eq!(self.vm.receive(0)[HEADER..], back);
    }

    /// Puts a frame into the tx ring without waiting for it.
    fn post(&mut self, index: u16, frame: &[u8]) {
        let at = buffer(1, index);
        self.vm.write_mem(at, &[PLAIN.as_slice(), frame].concat());
        let len = (HEADER + frame.len()) as u32;
        self.vm.queues[1].ring.chain(index, &[d(at, len, 0)]);
        self.vm.queues[1].ring.offer(index);
        self.vm.kick(1);
    }
}

#[test]
fn the_kernel_moves_frames_both_ways() {
    let Some(mut bed) = Bed::new(1) else {
        return;
    };
    let reply: HelloResponse = bed
        .client
        .call(DEVICE_SERVICE, "Hello", &HelloRequest::new(), PATIENCE)
        .unwrap();
    assert_eq!(reply.confinement.policy, "bulkhead-net-vhost");
    assert_eq!(reply.confinement.io_engine, "vhost-net");
    assert_eq!(bed.vm.features & (f::F_CTRL_RX | f::F_CTRL_VLAN), 0);
    let wire = Wire::new("t0", false);
    bed.vm.offer_buffers(0, 0, 32);
    for seed in 0..5 {
        bed.talk(&wire, seed);
    }
    let stats = bed.stats();
    assert_eq!(stats.net.datapath, "vhost-net");
    assert!(
        stats.queues.iter().all(|queue| queue.index == 2),
        "what the kernel does is not seen here: {stats:?}"
    );
    // Rings stop and go on where they were.
    for round in 0..3 {
        for queue in 0..2 {
            let base = bed.vm.frontend.get_vring_base(queue).unwrap();
            let offered = if queue == 0 { 37 + round } else { 5 + round };
            let used = bed.vm.queues[queue].ring.used_idx();
            assert_eq!(base, u32::from(used), "{offered}");
            bed.vm.start_queue(queue, used);
        }
        bed.talk(&wire, 100 + round as u8);
    }
    let _: ShutdownResponse = bed
        .client
        .call(
            DEVICE_SERVICE,
            "Shutdown",
            &ShutdownRequest::new(),
            PATIENCE,
        )
        .unwrap();
    assert_eq!(bed.net.wait_exit().code(), Some(0), "{}", bed.net.stderr());
}

#[test]
fn link_drain_and_limits_are_honest() {
    let Some(mut bed) = Bed::new(1) else {
        return;
    };
    let wire = Wire::new("t0", false);
    bed.vm.offer_buffers(0, 0, 32);
    bed.talk(&wire, 1);
    let frame = ether(PEER, MAC_BYTES, 100, 2);
    bed.link(Link::DOWN);
    assert_eq!(bed.vm.link_status(), 0);
    bed.post(1, &frame);
    assert_eq!(wire.receive_within(Duration::from_millis(100)), None);
    bed.link(Link::UP);
    assert_eq!(bed.vm.link_status(), 3);
    assert_eq!(bed.vm.command(2, 3, 0, &[]), 0);
    assert_eq!(wire.receive(), frame);
    assert_eq!(bed.vm.completion(1).0, 1);
    assert_eq!(bed.vm.command(2, 3, 0, &[]), 0);
    assert_eq!(bed.vm.link_status(), 1);

    let client = &mut bed.client;
    wait_for("the drain", || {
        let reply: DrainResponse = client
            .call(DEVICE_SERVICE, "Drain", &DrainRequest::new(), PATIENCE)
            .unwrap();
        reply.drained
    });
    bed.post(2, &frame);
    assert_eq!(wire.receive_within(Duration::from_millis(100)), None);
    let _: ResumeResponse = bed
        .client
        .call(DEVICE_SERVICE, "Resume", &ResumeRequest::new(), PATIENCE)
        .unwrap();
    assert_eq!(wire.receive(), frame);
    assert_eq!(bed.vm.completion(1).0, 2);

    let mut bucket = TokenBucket::new();
    bucket.per_second = 5;
    let mut limits = NetLimits::new();
    limits.packets = MessageField::some(bucket);
    let mut update = NetUpdate::new();
    update.to_guest = MessageField::some(limits);
    update.link = Link::DOWN.into();
    let refused = bed.update(update).unwrap_err();
    assert!(refused.contains("(vhost-net) and knows no limits: give backend=user"));
    assert_eq!(bed.vm.link_status() & 1, 1, "all of it or nothing");
    bed.talk(&wire, 3);
}

#[test]
fn two_pairs_and_new_memory() {
    let Some(mut bed) = Bed::new(2) else {
        return;
    };
    let wire = Wire::new("t0", false);
    bed.vm.offer_buffers(0, 0, 32);
    bed.vm.offer_buffers(2, 0, 32);
    bed.talk(&wire, 1);
    assert_eq!(bed.vm.command(2 * bed.pairs, 4, 0, &2u16.to_le_bytes()), 0);
    let out = ether(PEER, MAC_BYTES, 700, 9);
    bed.vm.send(3, &PLAIN, &out);
    assert_eq!(wire.receive(), out);
    let region = bed.vm.region();
    bed.vm.frontend.set_mem_table(&[region]).unwrap();
    bed.vm.send(3, &PLAIN, &out);
    assert_eq!(wire.receive(), out);
    assert_eq!(bed.vm.command(2 * bed.pairs, 4, 0, &1u16.to_le_bytes()), 0);
    bed.talk(&wire, 4);
}

#[test]
fn a_ring_that_the_kernel_finds_malformed_costs_that_ring() {
    let Some(mut bed) = Bed::new(1) else {
        return;
    };
    let wire = Wire::new("t0", false);
    bed.vm.offer_buffers(0, 0, 32);
    bed.vm.queues[1].ring.set_avail_idx(5000);
    bed.vm.kick(1);
    wait_for("the error", || bed.vm.err_fired(1));
    let health: HealthResponse = bed
        .client
        .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
        .unwrap();
    assert!(health.rings[1].broken && !health.rings[0].broken);
    let back = ether(MAC_BYTES, PEER, 1000, 1);
    wire.send(&back);
    assert_eq!(bed.vm.receive(0)[HEADER..], back);
    // As a guest's reset does it.
    bed.vm.frontend.get_vring_base(1).unwrap();
    bed.vm.queues[1].ring.reset();
    bed.vm.start_queue(1, 0);
    bed.talk(&wire, 2);
    assert!(bed.net.is_running());
}

#[test]
fn a_frame_that_finds_its_tap_deleted_costs_no_ring() {
    let Some(mut bed) = Bed::new(1) else {
        return;
    };
    let wire = Wire::new("t0", false);
    bed.vm.offer_buffers(0, 0, 32);
    bed.talk(&wire, 1);
    ip(&["link", "del", "t0"]);
    let frame = ether(PEER, MAC_BYTES, 200, 3);
    bed.post(20, &frame);
    // Found by the frame: nobody has asked for health.
    wait_for("the link to go down", || !bed.stats().net.unwrap().link_up);
    let health: HealthResponse = bed
        .client
        .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
        .unwrap();
    assert!(health.host_gone && !health.rings.iter().any(|ring| ring.broken));
    assert!(!bed.vm.err_fired(1) && bed.net.is_running());
}

#[test]
fn a_descriptor_that_is_no_vhost_net_is_named() {
    if !isolated() {
        return;
    }
    let tap = Tap::attach("t0", 1, None).unwrap();
    let null = [File::open("/dev/null").unwrap()];
    let (mut net, _control, _vhost) = Net::inherit_with(&tap, &null, &[]);
    assert_eq!(net.wait_exit().code(), Some(1));
    let said = net.stderr();
    assert!(
        said.contains("/dev/vhost-net") && said.lines().count() == 1,
        "{said}"
    );
}

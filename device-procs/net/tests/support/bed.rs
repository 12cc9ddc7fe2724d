//! A process as the launcher starts it: with its control channel, its front-end and its tap.

use bulkhead_net::tap::Tap;
use bulkhead_proto::device::net_update::Link;
use bulkhead_proto::device::{
    HealthRequest, HealthResponse, NetState, NetUpdate, RingHealth, StatsRequest, StatsResponse,
    UpdateRequest, UpdateResponse, update_request,
};
use bulkhead_proto::server::CONTROL_MAX_FRAME;
use bulkhead_proto::{BlockingClient, DEVICE_SERVICE};

use super::*;

pub const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub const PLAIN: [u8; HEADER] = [0; HEADER];
pub const OK: u8 = 0;
pub const ERR: u8 = 1;

pub struct Bed {
    pub net: Net,
    pub client: BlockingClient,
    pub vm: Vm,
    pub tap: Tap,
    pub pairs: usize,
}

impl Bed {
    pub fn new(engine: &str, pairs: u16, more: &[&str], choose: impl Fn(u64) -> u64) -> Self {
        let tap = Tap::attach("t0", pairs, None).unwrap();
        up("t0");
        let args = [&["--io-engine", engine], more].concat();
        let (net, control, vhost) = Net::inherit(&tap, &args);
        let client = BlockingClient::new(control, CONTROL_MAX_FRAME);
        let mut vm = Vm::over(vhost, 2 * pairs + 1, choose);
        vm.start();
        Self {
            net,
            client,
            vm,
            tap,
            pairs: usize::from(pairs),
        }
    }

    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        self.vm.command(2 * self.pairs, class, command, data)
    }

    pub fn stats(&mut self) -> StatsResponse {
        self.client
            .call(DEVICE_SERVICE, "Stats", &StatsRequest::new(), PATIENCE)
            .unwrap()
    }

    pub fn health(&mut self) -> Vec<RingHealth> {
        let reply: HealthResponse = self
            .client
            .call(DEVICE_SERVICE, "Health", &HealthRequest::new(), PATIENCE)
            .unwrap();
        reply.rings
    }

    pub fn state(&mut self) -> NetState {
        self.stats().net.unwrap()
    }

    pub fn update(&mut self, update: NetUpdate) -> Result<UpdateResponse, String> {
        let mut request = UpdateRequest::new();
        request.kind = Some(update_request::Kind::Net(update));
        self.client
            .call(DEVICE_SERVICE, "Update", &request, PATIENCE)
            .map_err(|e| e.to_string())
    }

    pub fn link(&mut self, link: Link) {
        let mut update = NetUpdate::new();
        update.link = link.into();
        self.update(update).unwrap();
    }

    /// Which of these frames the guest gets, when they are sent one after another.
    pub fn passing(&mut self, wire: &Wire, frames: &[Vec<u8>]) -> Vec<bool> {
        let last = ether(MAC_BYTES, PEER, 60, 0xee);
        let mut passing = Vec::new();
        for frame in frames {
            wire.send(frame);
            wire.send(&last);
            let mut got = self.vm.receive(0);
            passing.push(got[HEADER..] == *frame);
            if got[HEADER..] == *frame {
                got = self.vm.receive(0);
            }
            assert_eq!(got[HEADER..], last);
        }
        passing
    }
}

pub fn engines(test: impl Fn(&str)) {
    for engine in ["io_uring", "plain"] {
        if !isolated() {
            return;
        }
        test(engine);
    }
}

pub fn macs(list: &[[u8; 6]]) -> Vec<u8> {
    let mut table = (list.len() as u32).to_le_bytes().to_vec();
    table.extend(list.concat());
    table
}

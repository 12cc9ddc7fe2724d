//! vmservice.VM without a guest: what it makes, refuses and ends, and what hostile clients
//! of it cannot do.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_proto::protobuf::Message;
use bulkhead_proto::protobuf::well_known_types::empty::Empty;
use bulkhead_proto::vmservice::{
    CapabilitiesVMResponse, CreateVMRequest, ModifyResourceRequest, ModifyType,
    PropertiesVMRequest, PropertiesVMResponse, VMState, VirtioConsole, virtio_device::Kind,
};
use bulkhead_proto::{Code, VM_SERVICE};
use bulkhead_tests::kata::{self, Client, QUIT, disk};
use bulkhead_tests::runner::{Test, Verdict, check};
use bulkhead_tests::vmm::{Scratch, Vmm, ctl, guest_file, nothing_left};

use super::assault::{assault, connect, create, frame_of, info, resident};
use super::delete::no_memory;
use super::disk::sparse;
use super::net_bad::until_event;
use super::rng::refused;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// What hostile clients may add to the VMM's memory, KiB.
pub const MAY_GROW: u64 = 16 << 10;

/// The tests.
pub fn native() -> Vec<Test> {
    let test = Test::short("kata");
    vec![
        test(
            "a machine is made, refused, changed and torn down as Kata would, and nothing is left",
            whole_life,
        ),
        test(
            "Quit ends the process at once, with a machine and without one",
            quit,
        ),
        test(
            "a client that vanishes during CreateVM, or after TeardownVM, holds nothing up",
            vanish,
        ),
        test(
            "hostile clients cost the VMM less than 16 MiB and the machine nothing",
            abuse,
        ),
    ]
}

/// CreateVM of a machine with one disk, at rootfs.
fn machine(scratch: &Scratch) -> Result<CreateVMRequest, String> {
    let image = sparse(scratch, "image", MIB)?;
    Ok(kata::create(
        (&guest_file("vmlinux"), "", "console=ttyS0"),
        (256, 2),
        &scratch.path("serial"),
        vec![("rootfs", 1, disk(&image, true))],
    ))
}

fn ends(vmm: &mut Vmm, code: i32) -> Verdict {
    let began = Instant::now();
    vmm.ends_with(code, LIMIT)?;
    check(began.elapsed() < QUIT, || {
        vmm.story(&format!("it took {:?} to end", began.elapsed()))
    })
}

fn whole_life() -> Verdict {
    let scratch = Scratch::new("kata")?;
    let socket = scratch.path("vm.sock");
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    let precondition = Code::FailedPrecondition;
    for method in ["ResumeVM", "PauseVM", "TeardownVM", "WaitVM"] {
        client.refused(method, &Empty::new(), precondition, "no machine")?;
    }
    let state = client.properties()?.state;
    check(state == VMState::UNINITIALIZED.into(), || {
        format!("{state:?}")
    })?;

    // Refused by name, before anything is made; then made.
    let good = machine(&scratch)?;
    let mut console = good.clone();
    let pcie = console.config.mut_or_insert_default().pcie.as_mut();
    let port = pcie.and_then(|pcie| pcie.root_complexes.first_mut());
    let port = port
        .and_then(|complex| complex.root_ports.get_mut(5))
        .ok_or("no port")?;
    let device = port.attached.mut_or_insert_default().mut_device();
    let mut connecting = VirtioConsole::new();
    let relay = connecting.backend.mut_or_insert_default().mut_relay();
    (relay.socket_path, relay.connect) = (scratch.path("console"), true);
    device.mut_virtio().kind = Some(Kind::Console(connecting));
    client.refused("CreateVM", &console, Code::Unimplemented, "virtio.console")?;
    let mut absent = good.clone();
    absent
        .config
        .mut_or_insert_default()
        .mut_direct_boot()
        .kernel_path = "/absent/k".into();
    client.refused("CreateVM", &absent, precondition, "/absent/k")?;
    // Refused when its memory is there already.
    absent
        .config
        .mut_or_insert_default()
        .mut_direct_boot()
        .kernel_path = scratch.path("image");
    client.refused("CreateVM", &absent, precondition, "is not a kernel")?;
    no_memory(vmm.pid())?;
    client.tell("CreateVM", &good)?;
    client.refused("CreateVM", &good, precondition, "already")?;

    let properties = client.properties()?;
    let memory = properties.memory_stats.clone().unwrap_or_default();
    check(
        properties.state == VMState::PAUSED.into()
            && memory.assigned_memory == 256 * MIB
            && memory.working_set_bytes > MIB
            && memory.working_set_bytes + memory.available_memory == 256 * MIB
            // It was made without room for more.
            && memory.reserved_memory == 0
            // No vCPU has begun: threads that wait have cost next to nothing.
            && properties.processor_stats.total_runtime_ns < 500_000_000,
        || format!("{properties}"),
    )?;
    // Nothing is told that was not asked for.
    let bare: PropertiesVMResponse = client
        .call("PropertiesVM", &PropertiesVMRequest::new())
        .map_err(|e| format!("{e:?}"))?;
    check(
        bare.memory_stats.is_none()
            && bare.processor_stats.is_none()
            && bare.state == VMState::PAUSED.into()
            && bare.halt_reason.is_none(),
        || format!("{bare}"),
    )?;
    let threads = kata::vcpu_threads(vmm.pid());
    check(threads == ["vp-0", "vp-1"], || format!("{threads:?}"))?;
    let can: CapabilitiesVMResponse = client
        .call("CapabilitiesVM", &Empty::new())
        .map_err(|e| format!("{e:?}"))?;
    check(
        can.supported_guest_os.len() == 1 && can.supported_resources.is_empty(),
        || format!("{can}"),
    )?;
    let mut more = ModifyResourceRequest::new();
    more.type_ = ModifyType::ADD.into();
    more.mut_processor().processor_index = 2;
    client.refused("ModifyResource", &more, precondition, "3 vCPUs are more")?;
    more.mut_processor().processor_index = 7;
    client.refused(
        "ModifyResource",
        &more,
        Code::InvalidArgument,
        "processor_index",
    )?;
    more.type_ = ModifyType::UPDATE.into();
    more.mut_memory().memory_mb = 512;
    client.refused("ModifyResource", &more, precondition, "CreateVM makes it")?;
    let paused = client.plain("PauseVM").err().unwrap_or_default();
    check(paused.contains("call ResumeVM first"), || paused)?;
    let log = vmm.errors();
    for told in [
        "vmservice.VM: CreateVM was refused: ",
        "vmservice.VM: ModifyResource was refused: no memory can be plugged",
        "vmservice.VM: PauseVM was refused: cannot pause",
    ] {
        check(log.contains(told), || format!("no {told:?} in {log}"))?;
    }
    ports(&scratch, &socket, &mut client)?;

    // A second client waits for the end.
    let (serial, other) = (scratch.path("serial"), socket.clone());
    check(Path::new(&serial).exists(), || "no serial socket".into())?;
    let waiter = std::thread::spawn(move || Client::connect(&other)?.plain("WaitVM"));
    std::thread::sleep(Duration::from_millis(300));
    check(!waiter.is_finished(), || "WaitVM did not wait".into())?;
    // And a third for a back-end that nobody starts: its call ends with the machine.
    let (absent, other) = (scratch.path("absent"), socket.clone());
    let adder = std::thread::spawn(move || {
        let device = format!("socket={absent},kind=fs,tag=x,id=late,queues=1,server=on");
        ctl(&other, &["add-vhost-user", &device])
    });
    until_event(&socket, "operation.began", "late")?;
    let began = Instant::now();
    client.plain("TeardownVM")?;
    let added = adder.join().map_err(|_| "a client panicked")?;
    refused(added, "the machine is gone")?;
    check(began.elapsed() < QUIT, || {
        format!("a call was held for {:?}", began.elapsed())
    })?;
    waiter.join().map_err(|_| "WaitVM panicked")??;
    let properties = client.properties()?;
    check(
        properties.state == VMState::HALTED.into()
            && properties.halt_reason.as_deref() == Some("ended by force"),
        || format!("{properties}"),
    )?;
    // All but the process itself is gone, and it still answers.
    kata::alone(vmm.pid())?;
    for path in [&serial, &socket] {
        check(!Path::new(path).exists(), || format!("{path} is left"))?;
    }
    client.plain("TeardownVM")?;
    client.plain("WaitVM")?;
    client.refused("ResumeVM", &Empty::new(), precondition, "has ended")?;
    client.plain("Quit")?;
    ends(&mut vmm, 0)?;
    nothing_left(QUIT)
}

/// Devices come and go behind the ports that are for it, and no others.
fn ports(scratch: &Scratch, socket: &str, client: &mut Client) -> Verdict {
    let data = sparse(scratch, "data", MIB)?;
    let add = |port| kata::addition(port, disk(&data, false));
    let precondition = Code::FailedPrecondition;
    for (port, code, words) in [
        ("rootfs", precondition, "port rootfs: a device is behind it"),
        ("hp24", Code::NotFound, "port hp24"),
    ] {
        client.refused("AddPcieDevice", &add(port), code, words)?;
    }
    client.refused(
        "RemovePcieDevice",
        &kata::removal("rootfs"),
        precondition,
        "hotplug",
    )?;
    client.refused(
        "RemovePcieDevice",
        &kata::removal("hp24"),
        Code::NotFound,
        "hp24",
    )?;
    let absent = kata::addition("hp0", disk("/absent/disk", false));
    client.refused("AddPcieDevice", &absent, precondition, "/absent/disk")?;
    for _ in 0..3 {
        client.add("hp0", disk(&data, false))?;
        client.refused("AddPcieDevice", &add("hp0"), precondition, "port hp0")?;
        let info = info(socket)?;
        let hp0 = info.ports.iter().find(|port| port.name == "hp0");
        check(
            info.ports.len() == 25
                && hp0.is_some_and(|p| p.device == "hp0" && p.pci_address == "0000:00:08.0"),
            || format!("{info}"),
        )?;
        client.remove("hp0")?;
        // Again, as a client does that has missed the answer.
        client.remove("hp0")?;
    }
    client.add("hp23", disk(&data, false))
}

fn quit() -> Verdict {
    let scratch = Scratch::new("kata-quit")?;
    let socket = scratch.path("vm.sock");
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    client.plain("Quit")?;
    ends(&mut vmm, 0)?;
    nothing_left(QUIT)?;
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    client.tell("CreateVM", &machine(&scratch)?)?;
    client.plain("Quit")?;
    ends(&mut vmm, 0)?;
    nothing_left(QUIT)?;
    // And a kill leaves nothing but the socket's name at most.
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    client.tell("CreateVM", &machine(&scratch)?)?;
    vmm.kill();
    nothing_left(QUIT)?;
    for path in [&scratch.path("serial"), &socket] {
        let end = Instant::now() + QUIT;
        while Path::new(path).exists() {
            check(Instant::now() < end, || format!("{path} is left"))?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

fn vanish() -> Verdict {
    let scratch = Scratch::new("kata-vanish")?;
    // All of it, of either service, part of it, and all of it again and again.
    let whole = request_of(&scratch)?;
    let part = whole.get(..whole.len() / 2).unwrap_or_default().to_vec();
    for (number, requests) in [
        vec![whole.clone()],
        vec![create()?],
        vec![part],
        vec![whole; 20],
    ]
    .iter()
    .enumerate()
    {
        let socket = scratch.path(&format!("vm{number}.sock"));
        let mut vmm = kata::start(&[], &socket)?;
        drop(Client::connect(&socket)?);
        for request in requests {
            let mut gone = connect(&socket)?;
            gone.write_all(request).map_err(|e| e.to_string())?;
        }
        // Begun or not, the next client has a VMM that answers.
        let mut client = Client::connect(&socket)?;
        let state = client.properties()?.state;
        if state == VMState::UNINITIALIZED.into() {
            client.tell("CreateVM", &machine(&scratch)?)?;
        }
        client.plain("TeardownVM")?;
        // It goes without Quit: the process has nobody left to stay for.
        drop(client);
        ends(&mut vmm, 0)?;
        nothing_left(QUIT)?;
    }
    Ok(())
}

/// A CreateVM as Kata's.
pub fn request_of(scratch: &Scratch) -> Result<Vec<u8>, String> {
    let request = machine(scratch)?.write_to_bytes();
    let request = request.map_err(|e| e.to_string())?;
    Ok(frame_of(VM_SERVICE, 1, "CreateVM", &request))
}

fn abuse() -> Verdict {
    let scratch = Scratch::new("kata-abuse")?;
    let socket = scratch.path("vm.sock");
    let mut vmm = kata::start(&[], &socket)?;
    let mut client = Client::connect(&socket)?;
    client.tell("CreateVM", &machine(&scratch)?)?;
    client.properties()?;
    let before = resident(vmm.pid())?;
    let creates = [request_of(&scratch)?, create()?];
    let held = assault(&socket, vmm.pid(), &creates)?;
    // The machine's own client was not touched by any of it.
    let state = client.properties()?.state;
    check(state == VMState::PAUSED.into(), || format!("{state:?}"))?;
    let after = resident(vmm.pid())?;
    check(after < before + MAY_GROW, || {
        format!("from {before} KiB to {after} KiB")
    })?;
    let mut other = Client::connect(&socket)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || sender.send(other.plain("WaitVM")));
    client.plain("TeardownVM")?;
    receiver
        .recv_timeout(LIMIT)
        .map_err(|e| format!("WaitVM after the abuse: {e}"))??;
    drop(waiter.join());
    client.plain("Quit")?;
    drop(held);
    ends(&mut vmm, 0)?;
    nothing_left(QUIT)
}

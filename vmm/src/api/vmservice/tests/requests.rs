//! The smaller requests, and bytes of any kind: none make the translation panic.

use proptest::prelude::*;

use super::*;

#[test]
fn a_device_is_added_behind_the_port_that_is_named() {
    let mut request = AddPcieDeviceRequest::new();
    request.port_name = "hp0".into();
    request.device = MessageField::some(endpoint(blk("/dev/loop0", true, true)));
    let made = parse("AddPcieDevice", &request.write_to_bytes().unwrap()).unwrap();
    let ApiRequest::AddDevice(add) = made else {
        panic!("{made:?}")
    };
    assert_eq!((add.port.as_str(), add.disk().id.as_str()), ("hp0", "hp0"));
    assert!(add.disk().readonly && add.disk().cache == Cache::CACHE_NONE.into());
    request.port_name = "../x".into();
    let status = parse("AddPcieDevice", &request.write_to_bytes().unwrap()).unwrap_err();
    assert!(status.message.starts_with("port_name"), "{status}");
    let status = parse("AddPcieDevice", &[]).unwrap_err();
    assert_eq!(status.code, Code::InvalidArgument);
}

#[test]
fn a_reset_by_the_guest_restarts_it_where_that_is_wanted() {
    use GuestPowerAction::{DEFAULT, HALT, RESTART};
    use bulkhead_proto::machine::machine_config::OnReset;
    let of = |reset: GuestPowerAction, crash: GuestPowerAction| {
        let mut request = kata();
        let actions = &mut config(&mut request).guest_power_actions;
        let actions = actions.mut_or_insert_default();
        (actions.reset, actions.crash) = (reset.into(), crash.into());
        match parse("CreateVM", &request.write_to_bytes().unwrap()) {
            Ok(ApiRequest::CreateVm(config)) => Ok(config.on_reset == OnReset::RESTART.into()),
            Ok(other) => panic!("{other:?}"),
            Err(status) => Err(status.message),
        }
    };
    for (reset, crash, restarts) in [
        (DEFAULT, DEFAULT, false),
        (HALT, DEFAULT, false),
        (RESTART, DEFAULT, true),
        (RESTART, RESTART, true),
    ] {
        assert_eq!(of(reset, crash), Ok(restarts), "{reset:?}, {crash:?}");
    }
    let line = of(RESTART, HALT).unwrap_err();
    assert!(line.contains("crash: HALT beside reset: RESTART"), "{line}");
}

#[test]
fn resources_are_modified_where_a_request_of_ours_does_it() {
    let of = |kind: ModifyType, resource: modify_resource_request::Resource| {
        let mut request = ModifyResourceRequest::new();
        request.type_ = kind.into();
        request.resource = Some(resource);
        parse("ModifyResource", &request.write_to_bytes().unwrap())
    };
    use modify_resource_request::Resource;
    let memory = |memory_mb| {
        let mut memory = ModifyMemory::new();
        memory.memory_mb = memory_mb;
        Resource::Memory(memory)
    };
    let made = of(ModifyType::UPDATE, memory(512)).unwrap();
    assert!(matches!(made, ApiRequest::ResizeMemory { size, .. } if size == 512 << 20));
    let mut cpu = ModifyProcessor::new();
    cpu.processor_index = 2;
    let made = of(ModifyType::ADD, Resource::Processor(cpu.clone())).unwrap();
    assert_eq!(
        made,
        ApiRequest::PlugCpu {
            index: 2,
            add: true
        }
    );
    let made = of(ModifyType::REMOVE, Resource::Processor(cpu.clone())).unwrap();
    assert_eq!(
        made,
        ApiRequest::PlugCpu {
            index: 2,
            add: false
        }
    );
    for (kind, resource, name) in [
        (ModifyType::ADD, memory(512), "type of memory"),
        (
            ModifyType::UPDATE,
            Resource::Processor(cpu),
            "type UPDATE of processor",
        ),
        (
            ModifyType::UPDATE,
            Resource::ProcessorConfig(ModifyProcessorConfig::new()),
            "processor_config",
        ),
        (
            ModifyType::ADD,
            Resource::ScsiDisk(ScsiDisk::new()),
            "scsi_disk",
        ),
        (
            ModifyType::ADD,
            Resource::VpmemDisk(VPMemDisk::new()),
            "vpmem_disk",
        ),
        (
            ModifyType::ADD,
            Resource::NicConfig(NicConfig::new()),
            "nic_config",
        ),
        (
            ModifyType::ADD,
            Resource::WindowsDevice(WindowsDevice::new()),
            "windows_device",
        ),
    ] {
        let status = of(kind, resource).unwrap_err();
        assert_eq!(status.code, Code::Unimplemented, "{status}");
        assert!(status.message.starts_with(name), "{status}");
    }
    for wrong in [0, (1 << 32) + 1, 1 << 50, u64::MAX] {
        let status = of(ModifyType::UPDATE, memory(wrong)).unwrap_err();
        assert_eq!(status.code, Code::InvalidArgument);
        let told = format!("memory.memory_mb is {wrong}: give all of the guest's memory in MiB");
        assert!(status.message.starts_with(&told), "{status}");
        assert!(status.message.ends_with("at most 4294967296"), "{status}");
    }
    assert!(of(ModifyType::UPDATE, memory(1 << 32)).is_ok());
}

#[test]
fn a_command_line_is_told_of_by_its_own_field() {
    let mut request = kata();
    config(&mut request).mut_direct_boot().kernel_cmdline = "a\0b".into();
    let told = create(&request).unwrap_err().message;
    let wanted = "config.direct_boot.kernel_cmdline contains a zero byte: leave it out";
    assert_eq!(told, wanted);
}

#[test]
fn remedies_are_what_this_services_client_can_do() {
    use crate::machine::state::{MachineState, Transition};
    let pause = MachineState::Created.apply(Transition::Pause).unwrap_err();
    let status = RpcStatus::failed_precondition(pause.to_string());
    let told = remedy::in_its_words(status);
    assert_eq!(told.code, Code::FailedPrecondition);
    let wanted = "cannot pause a machine that is created: call ResumeVM first";
    assert_eq!(told.message, wanted);
    let other = RpcStatus::failed_precondition("boot it first, or not");
    assert_eq!(remedy::in_its_words(other.clone()), other);
}

#[test]
fn empty_requests_and_strangers() {
    assert_eq!(parse("ResumeVM", &[]), Ok(ApiRequest::Go));
    assert_eq!(parse("WaitVM", &[]), Ok(ApiRequest::Wait));
    for (method, name) in [("ResumeVM", "Empty"), ("CreateVM", "CreateVMRequest")] {
        let status = parse(method, &[0x90, 0x06, 1]).unwrap_err();
        assert_eq!(status.code, Code::Unimplemented);
        let start = format!("field 98 of {name} is not offered: this version");
        assert!(status.message.starts_with(&start), "{status}");
    }
    assert_eq!(
        parse("resumeVM", &[]).unwrap_err().code,
        Code::Unimplemented
    );
    assert_eq!(
        parse("ResumeVM", &[0xff]).unwrap_err().code,
        Code::InvalidArgument
    );
}

const METHODS: [&str; 11] = [
    "CreateVM",
    "TeardownVM",
    "PauseVM",
    "ResumeVM",
    "WaitVM",
    "CapabilitiesVM",
    "PropertiesVM",
    "ModifyResource",
    "AddPcieDevice",
    "RemovePcieDevice",
    "Quit",
];

proptest! {
    #[test]
    fn garbage_never_panics(
        method in prop::sample::select(METHODS.to_vec()),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let _ = parse(method, &payload);
    }

    #[test]
    fn a_damaged_request_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut bytes = kata().write_to_bytes().unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(ApiRequest::CreateVm(config)) = parse("CreateVM", &bytes) {
            // What passes is a configuration that the manager takes.
            prop_assert_eq!(crate::api::config::validate(&config), Ok(()));
        }
    }

    #[test]
    fn a_damaged_addition_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        method in prop::sample::select(METHODS.to_vec()),
    ) {
        let mut request = AddPcieDeviceRequest::new();
        request.port_name = "hp0".into();
        request.device = MessageField::some(endpoint(net("tap0", "02-00-00-00-00-01")));
        let mut bytes = request.write_to_bytes().unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = parse(method, &bytes);
    }
}

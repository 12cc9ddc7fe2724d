//! ModifyResourceRequest: processors and memory, where the machine was made with more than it
//! has.

use bulkhead_proto::RpcStatus;
use bulkhead_proto::vmservice::{ModifyResourceRequest, ModifyType, modify_resource_request};

use super::create::memory_bytes;
use super::{not_offered, wrong};
use crate::api::request::{ApiRequest, WAIT_DEFAULT};

/// The request that a message stands for.
pub(super) fn request(from: ModifyResourceRequest) -> Result<ApiRequest, RpcStatus> {
    use modify_resource_request::Resource;
    let kind = from
        .type_
        .enum_value()
        .map_err(|number| wrong(format!("type is {number}: give 0 to 2")))?;
    let hotplug = "give AddPcieDevice and RemovePcieDevice";
    match (from.resource, kind) {
        (Some(Resource::Memory(memory)), ModifyType::UPDATE) => {
            let whose = "all of the guest's memory";
            let size = memory_bytes("memory.memory_mb", whose, memory.memory_mb)?;
            Ok(ApiRequest::ResizeMemory {
                size,
                timeout: WAIT_DEFAULT,
            })
        }
        (Some(Resource::Memory(_)), _) => Err(not_offered(
            "type of memory other than UPDATE",
            "give UPDATE and all of the guest's memory",
        )),
        (Some(Resource::Processor(cpu)), ModifyType::ADD) => Ok(ApiRequest::PlugCpu {
            index: cpu.processor_index,
            add: true,
        }),
        (Some(Resource::Processor(cpu)), ModifyType::REMOVE) => Ok(ApiRequest::PlugCpu {
            index: cpu.processor_index,
            add: false,
        }),
        (Some(Resource::Processor(_)), ModifyType::UPDATE) => Err(not_offered(
            "type UPDATE of processor",
            "give ADD or REMOVE",
        )),
        (Some(Resource::ProcessorConfig(_)), _) => Err(not_offered(
            "processor_config",
            "limit the process by its cgroup",
        )),
        (Some(Resource::ScsiDisk(_)), _) => Err(not_offered("scsi_disk", hotplug)),
        (Some(Resource::VpmemDisk(_)), _) => Err(not_offered("vpmem_disk", hotplug)),
        (Some(Resource::NicConfig(_)), _) => Err(not_offered("nic_config", hotplug)),
        (Some(Resource::WindowsDevice(_)), _) => Err(not_offered("windows_device", hotplug)),
        _ => Err(wrong("resource is missing: give memory or processor")),
    }
}

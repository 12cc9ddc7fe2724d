//! What each message of the front-end does (vhost-user protocol, "Front-end message types").
//!
//! Called on the main thread, by the vhost-user request handler of [`crate::link`].

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::{Backend, Meanwhile, refuse};
use crate::backend_channel::BackendChannel;
use crate::device::offered_features;
use crate::inflight::{Capacity, InflightRegion};
use crate::link::Intercepted;
use crate::mailbox::Order;
use crate::memory::{MAX_REGIONS, Memory, Region};
use crate::ring::RingLayout;

impl<M: Meanwhile> VhostUserBackendReqHandlerMut for Backend<M> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated; ambiguous in the specification, which lets it be ignored.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        if self.reset() {
            Ok(())
        } else {
            Err(refuse("queues did not drain"))
        }
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(offered_features(&self.device))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !offered_features(&self.device) != 0 {
            return Err(refuse("feature bits acknowledged that were not offered"));
        }
        if features != self.acked {
            // A front-end with several queue pairs (QEMU's vhost-user-net) says the same
            // once for each; only a change concerns rings that run.
            if !self.stop_all() {
                return Err(refuse("queue did not drain"));
            }
            self.accept(features);
        }
        for i in 0..self.rings.len() {
            self.apply(i)?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        if ctx.len() != files.len() {
            return Err(Error::IncorrectFds);
        }
        let mut regions = Vec::with_capacity(ctx.len());
        for (r, file) in ctx.iter().zip(&files) {
            regions.push(map(r, file)?);
        }
        self.set_memory(Memory::new(regions).map_err(refuse)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index as usize)?.layout.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let ring = self.ring(index as usize)?;
        ring.layout = RingLayout {
            size: ring.layout.size,
            desc: descriptor,
            avail: available,
            used,
        };
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| refuse("ring base beyond 16 bits"))?;
        self.ring(index as usize)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let i = index as usize;
        if self.ring(i)?.serving {
            self.stop(i)?;
        }
        let ring = self.ring(i)?;
        ring.kick = None;
        let base = ring.base;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.ok_or_else(|| refuse("kicks by polling are not supported; pass an eventfd"))?;
        if self.ring(i)?.serving {
            self.stop(i)?;
        }
        self.ring(i)?.kick = Some(Arc::new(fd));
        self.apply(i)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.map(Arc::new);
        let ring = self.ring(i)?;
        ring.call = fd.clone();
        if ring.serving {
            self.order(i, Order::Call(fd))?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let i = usize::from(index);
        let fd = fd.map(Arc::new);
        let ring = self.ring(i)?;
        ring.err = fd.clone();
        if ring.serving {
            self.order(i, Order::Err(fd))?;
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // The request handler remembers them too and refuses messages that need others.
        self.acked_protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let i = index as usize;
        self.ring(i)?.enabled = enable;
        self.apply(i)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The request handler has bounded offset and size by 256.
        let config = self.device.config();
        let mut out = vec![0; size as usize];
        for (to, from) in out.iter_mut().zip(config.iter().skip(offset as usize)) {
            *to = *from;
        }
        Ok(out)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // A driver's write that the device does not take is dropped, as the guest's
        // affair; it is no fault of the connection.
        if !self.device.write_config(offset, buf) {
            log::debug!("driver wrote read-only configuration space at {offset}");
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU here"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("answered without the handler"))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let region = InflightRegion::map(
            &file,
            inflight.mmap_size,
            inflight.mmap_offset,
            inflight.num_queues,
            inflight.queue_size,
            Capacity {
                queues: self.device.queues(),
                kept: self.device.kept_bytes(),
            },
        )
        .map_err(refuse)?;
        if self.rings.iter().all(|r| !r.serving)
            && let Some(kept) = region.kept()
        {
            let before = self.device.config();
            self.device.keep(kept).map_err(refuse)?;
            // What was kept may show in it: a size, a driver that is to announce itself.
            if self.device.config() != before {
                self.channel.config_changed();
            }
        }
        self.inflight = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let table = self.memory.with(map(region, &fd)?).map_err(refuse)?;
        self.set_memory(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table = self
            .memory
            .without(region.guest_phys_addr, region.user_addr, region.memory_size)
            .map_err(refuse)?;
        self.set_memory(table)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}

impl<M: Meanwhile> Intercepted for Backend<M> {
    fn enable_ring(&mut self, index: u32, enable: bool) -> Result<()> {
        self.set_vring_enable(index, enable)
    }

    fn set_backend_channel(&mut self, socket: OwnedFd) -> Result<()> {
        if !self
            .acked_protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            return Err(Error::InactiveOperation(
                VhostUserProtocolFeatures::BACKEND_REQ,
            ));
        }
        self.channel = BackendChannel::new(socket);
        Ok(())
    }

    fn offer_inflight(&mut self, queues: u16, queue_size: u16) -> Result<(u64, &File)> {
        let feature = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        if !self.acked_protocol.contains(feature) {
            return Err(Error::InactiveOperation(feature));
        }
        if self.rings.iter().any(|r| r.serving) {
            return Err(refuse(
                "a new in-flight region was asked for while rings run; stop them first",
            ));
        }
        self.inflight_file.offer(queues, queue_size).map_err(refuse)
    }

    fn acknowledges(&self) -> bool {
        self.acked_protocol
            .contains(VhostUserProtocolFeatures::REPLY_ACK)
    }
}

fn map(r: &VhostUserMemoryRegion, file: &File) -> Result<Region> {
    #[cfg(feature = "hostile")]
    crate::hostile::strike_memory(file);
    Region::map(
        file,
        r.guest_phys_addr,
        r.memory_size,
        r.user_addr,
        r.mmap_offset,
    )
    .map_err(refuse)
}

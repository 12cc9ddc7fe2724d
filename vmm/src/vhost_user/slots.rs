//! Memory regions that come and go while the back-end serves (vhost-user protocol,
//! "VHOST_USER_ADD_MEM_REG", "VHOST_USER_REM_MEM_REG").

use std::os::fd::AsFd;

use vhost::vhost_user::message::FrontendReq;

use super::error::VhostUserError;
use super::frontend::Frontend;
use super::{Deadline, MemoryRegion, user_address};

impl Frontend {
    /// How many memory regions the back-end maps, where it can take them one by one; 0: it
    /// cannot.
    pub fn memory_slots(&self) -> u64 {
        self.slots
    }

    /// ADD_MEM_REG: the back-end may use one more region.
    pub fn add_mem_region(
        &mut self,
        region: &MemoryRegion,
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        let what = "ADD_MEM_REG";
        let payload = self.describe(region)?;
        let fds = [region.file.as_fd()];
        self.command(FrontendReq::ADD_MEM_REG, what, &payload, &fds, deadline)
    }

    /// REM_MEM_REG: it may not any more, and does not once this returns.
    pub fn remove_mem_region(
        &mut self,
        region: &MemoryRegion,
        deadline: Deadline,
    ) -> Result<(), VhostUserError> {
        let what = "REM_MEM_REG";
        let payload = self.describe(region)?;
        self.command(FrontendReq::REM_MEM_REG, what, &payload, &[], deadline)?;
        self.barrier(deadline)
    }

    /// A single memory region description: padding, then the region.
    fn describe(&self, region: &MemoryRegion) -> Result<Vec<u8>, VhostUserError> {
        if self.slots == 0 {
            return Err(VhostUserError::Unsupported("memory regions one by one"));
        }
        let user = user_address(region.guest_base)
            .ok_or(VhostUserError::Unencodable("a memory region this high"))?;
        let fields = [0, region.guest_base, region.size, user, region.file_offset];
        Ok(fields
            .iter()
            .flat_map(|field| field.to_ne_bytes())
            .collect())
    }
}

//! What a vCPU was before its first instruction, and how it becomes that again when the machine is
//! reset: registers, MSRs, local APIC, floating point, pending events, and whether it runs or waits
//! for the guest's start-up interrupt.
//!
//! Taken by the manager thread while vCPUs are made, put back by each vCPU's own thread while it is
//! parked. A KVM_RUN that was interrupted has been completed by then (`vcpu::run`), so that nothing
//! of an access is left to be done.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::boot::BootEntry;
use super::state::{REMEDY, entry_registers, system_registers};
use crate::kvm::{KvmError, set_xsave};

const MSR_TSC: u32 = 0x10;
/// What KVM_SET_SREGS sets: the local APIC's base, EFER, the bases of FS and GS.
const IN_SREGS: [u32; 4] = [0x1b, 0xc000_0080, 0xc000_0100, 0xc000_0101];
/// Hyper-V's, which CPUID does not offer: KVM makes a context for who touches them.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// MISC_ENABLE, and the MTRRs, which older kernels do not list.
const UNLISTED: [std::ops::RangeInclusive<u32>; 6] = [
    0x1a0..=0x1a0,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];
/// MSRs of one call: KVM takes 256.
const MOST_MSRS: usize = 128;

/// A vCPU's first state.
pub(crate) struct Snapshot {
    sregs: kvm_sregs,
    msrs: Vec<kvm_msr_entry>,
    lapic: Box<kvm_lapic_state>,
    xsave: Box<kvm_xsave>,
    /// `None`: the host's CPU has none.
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

/// The MSRs that are to be put back, from KVM's list.
fn wanted(listed: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = listed.to_vec();
    all.extend(UNLISTED.into_iter().flatten());
    all.retain(|index| !IN_SREGS.contains(index) && !HYPER_V.contains(index));
    all.sort_unstable();
    all.dedup();
    all
}

/// Has `call` take entries, leaves out each that KVM does not, and says which those are. It tells
/// how many it has taken: the next one is refused.
fn each_msr(
    entries: &[kvm_msr_entry],
    mut call: impl FnMut(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<(Vec<kvm_msr_entry>, Vec<u32>), KvmError> {
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    let mut rest = entries;
    while !rest.is_empty() {
        let (some, _) = rest.split_at(rest.len().min(MOST_MSRS));
        let mut msrs =
            Msrs::from_entries(some).map_err(|_| KvmError::Capability("room for the MSRs"))?;
        let done = call(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS", REMEDY))?;
        taken.extend(msrs.as_slice().iter().take(done).copied());
        let mut next = done;
        if let Some(bad) = some.get(done) {
            refused.push(bad.index);
            next = done.saturating_add(1);
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok((taken, refused))
}

impl Snapshot {
    /// Takes the state of a vCPU that has not run; `listed`: KVM's list of MSRs.
    ///
    /// # Errors
    /// KVM does not tell: the vCPU cannot be reset.
    pub(crate) fn take(vcpu: &VcpuFd, listed: &[u32]) -> Result<Self, KvmError> {
        let call = |name| KvmError::call::<kvm_ioctls::Error>(name, REMEDY);
        let asked: Vec<kvm_msr_entry> = wanted(listed)
            .into_iter()
            .map(|index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let (mut msrs, _) = each_msr(&asked, |msrs| vcpu.get_msrs(msrs))?;
        for entry in &mut msrs {
            if entry.index == MSR_TSC {
                // As of a vCPU that was just made: KVM sets it to what the others have.
                entry.data = 0;
            }
        }
        // Some can only be read.
        let (msrs, _) = each_msr(&msrs, |msrs| vcpu.set_msrs(msrs))?;
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            msrs,
            lapic: Box::new(vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?),
            xsave: Box::new(vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().ok(),
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(call("KVM_GET_VCPU_EVENTS"))?,
            mp_state: vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
        })
    }

    /// Puts it back; the boot processor is pointed at the kernel (`boot`).
    ///
    /// # Errors
    /// KVM refused.
    pub(crate) fn put_back(&self, vcpu: &VcpuFd, boot: Option<&BootEntry>) -> Result<(), KvmError> {
        let call = |name| KvmError::call::<kvm_ioctls::Error>(name, REMEDY);
        let (mut sregs, mut regs) = (
            self.sregs,
            kvm_regs {
                rip: 0xfff0,
                rflags: 2,
                ..Default::default()
            },
        );
        if let Some(boot) = boot {
            system_registers(&mut sregs, boot.mode());
            regs = entry_registers(boot);
        }
        // First: it leaves x2APIC mode, in which a local APIC's state looks different.
        vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        let (_, refused) = each_msr(&self.msrs, |msrs| vcpu.set_msrs(msrs))?;
        if !refused.is_empty() {
            log::warn!("a reset leaves MSRs as the guest had them: {refused:x?}");
        }
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(call("KVM_SET_XCRS"))?;
        }
        set_xsave(vcpu, &self.xsave).map_err(KvmError::call("KVM_SET_XSAVE", REMEDY))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(call("KVM_SET_MP_STATE"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(indices: &[u32]) -> Vec<kvm_msr_entry> {
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        indices.iter().map(entry).collect()
    }

    #[test]
    fn msrs_of_other_calls_and_of_hyper_v_are_left_out_and_none_comes_twice() {
        let wanted = wanted(&[0x2ff, 0x4000_0020, 0xc000_0080, 0x174, 0x10]);
        assert!(wanted.windows(2).all(|pair| pair[0] < pair[1]));
        for index in [0x10, 0x174, 0x2ff, 0x200, 0x26f, 0x1a0] {
            assert!(wanted.contains(&index), "{index:#x}");
        }
        for index in [0x4000_0020, 0xc000_0080, 0x1b] {
            assert!(!wanted.contains(&index), "{index:#x}");
        }
    }

    #[test]
    fn what_kvm_refuses_is_left_out_and_the_rest_is_gone_through() {
        let all: Vec<u32> = (0..300).collect();
        let bad = [0, 127, 128, 129, 299];
        let (taken, refused) = each_msr(&entries(&all), |msrs| {
            let first_bad = msrs.as_slice().iter().position(|e| bad.contains(&e.index));
            Ok(first_bad.unwrap_or(msrs.as_slice().len()))
        })
        .unwrap();
        assert_eq!(refused, bad);
        assert_eq!(taken.len(), all.len() - bad.len());
        assert!(taken.iter().all(|entry| !bad.contains(&entry.index)));
    }
}

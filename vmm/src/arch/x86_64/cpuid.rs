//! What a vCPU says of itself: KVM_GET_SUPPORTED_CPUID with this machine's topology (one
//! package, one thread per core), its APIC ids, and without what would need more than this
//! machine has (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).
//!
//! Called by the manager thread while vCPUs are made.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::kvm::KvmError;

/// What decides on feature bits besides KVM's own list.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// KVM_CAP_TSC_DEADLINE_TIMER.
    pub tsc_deadline: bool,
    /// KVM_GET_TSC_KHZ, where the host's TSC is stable.
    pub tsc_khz: Option<u32>,
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_SVM: u32 = 1 << 2;

/// KVM's local APIC counts at 1 GHz (APIC_BUS_CYCLE_NS).
const APIC_KHZ: u32 = 1_000_000;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// Bits that hold the numbers 0 to `count` - 1.
fn id_bits(count: u32) -> u32 {
    32u32.saturating_sub(count.saturating_sub(1).leading_zeros())
}

/// The leaves of vCPU `index` of `count`, made from the host's.
pub fn for_vcpu(
    host: &CpuId,
    index: u32,
    count: u32,
    features: Features,
) -> Result<CpuId, KvmError> {
    let mut leaves: Vec<kvm_cpuid_entry2> = host.as_slice().to_vec();
    shape(&mut leaves, index, count, features);
    CpuId::from_entries(&leaves).map_err(|_| KvmError::Capability("room for the CPUID leaves"))
}

fn shape(leaves: &mut Vec<kvm_cpuid_entry2>, index: u32, count: u32, features: Features) {
    let max_basic = max_leaf(leaves, 0);
    // Topology leaves are made anew, below.
    leaves.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f | HYPERVISOR_TIMING));
    let others = count.saturating_sub(1);
    for leaf in leaves.iter_mut() {
        match leaf.function {
            0x1 => {
                let logical = count.min(0xff);
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | (logical << 16) | (index << 24);
                leaf.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_TSC_DEADLINE);
                leaf.ecx |= LEAF1_ECX_HYPERVISOR;
                if features.tsc_deadline {
                    leaf.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
                set(&mut leaf.edx, LEAF1_EDX_HTT, count > 1);
            }
            0x4 if leaf.eax & 0x1f != 0 => {
                // Intel's caches: the first two levels per core, the rest for the package.
                let level = (leaf.eax >> 5) & 7;
                let sharers = if level < 3 { 0 } else { others.min(0xfff) };
                leaf.eax = (leaf.eax & 0x3fff) | (sharers << 14) | (others.min(0x3f) << 26);
            }
            HYPERVISOR_BASE if features.tsc_khz.is_some() => {
                leaf.eax = leaf.eax.max(HYPERVISOR_TIMING);
            }
            0x8000_0001 => {
                leaf.ecx &= !EXT1_ECX_SVM;
                set(&mut leaf.ecx, EXT1_ECX_CMP_LEGACY, count > 1);
            }
            0x8000_0008 => {
                // Threads less one, and the width of an APIC id.
                leaf.ecx = (leaf.ecx & 0xffff_0f00) | others.min(0xff) | (id_bits(count) << 12);
            }
            // SVM's own leaf: there is no nested SVM.
            0x8000_000a => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let level = (leaf.eax >> 5) & 7;
                let sharers = if level < 3 { 0 } else { others.min(0xfff) };
                leaf.eax = (leaf.eax & 0x3fff) | (sharers << 14);
            }
            // APIC id; core id with one thread per core; one node.
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (index, index & 0xff, 0, 0),
            _ => {}
        }
    }
    for function in [0xb, 0x1f] {
        if max_basic >= function {
            leaves.extend(topology(function, index, count));
        }
    }
    if let Some(khz) = features.tsc_khz
        && max_leaf(leaves, HYPERVISOR_BASE) >= HYPERVISOR_TIMING
    {
        leaves.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: khz,
            ebx: APIC_KHZ,
            ..Default::default()
        });
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

fn max_leaf(leaves: &[kvm_cpuid_entry2], base: u32) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == base)
        .map_or(0, |leaf| leaf.eax)
}

/// Extended topology: a level of threads (one per core), a level of cores, the end.
fn topology(function: u32, index: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    const SMT: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |subleaf: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: kind | subleaf,
        edx: index,
        ..Default::default()
    };
    [
        level(0, 0, 1, SMT),
        level(1, id_bits(count), count, CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: 0x5500_0800,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        vec![
            leaf(0, 0, 0x1f),
            leaf(1, 0, 0x0080_0f12),
            leaf(4, 0, 0xfc00_0121),
            leaf(4, 3, 0xfc00_0163),
            leaf(4, 4, 0),
            leaf(0xb, 0, 9),
            leaf(0xb, 1, 9),
            leaf(0x1f, 0, 9),
            leaf(HYPERVISOR_BASE, 0, 0x4000_0001),
            leaf(0x8000_0001, 0, 0),
            leaf(0x8000_0008, 0, 0x3028),
            leaf(0x8000_000a, 0, 1),
            leaf(0x8000_001d, 3, 0x0000_4163),
            leaf(0x8000_001e, 0, 77),
        ]
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves
            .iter()
            .filter(|l| (l.function, l.index) == (function, index));
        let leaf = *found.next().unwrap();
        assert!(
            found.next().is_none(),
            "leaf {function:#x}.{index} is there twice"
        );
        leaf
    }

    proptest! {
        #[test]
        fn every_leaf_tells_the_same_topology(count in 1u32..=254, pick in any::<u32>()) {
            let index = pick % count;
            let mut leaves = host();
            shape(&mut leaves, index, count, Features { tsc_deadline: true, tsc_khz: Some(2_000_000) });
            let one = get(&leaves, 1, 0);
            prop_assert_eq!(one.ebx >> 24, index);
            prop_assert_eq!((one.ebx >> 16) & 0xff, count);
            prop_assert_eq!(one.edx & LEAF1_EDX_HTT != 0, count > 1);
            prop_assert_eq!(one.ecx & LEAF1_ECX_VMX, 0);
            for function in [0xb, 0x1f] {
                let core = get(&leaves, function, 1);
                prop_assert_eq!((core.ebx, core.edx), (count, index));
                prop_assert!(index >> core.eax == 0, "all cores are in one package");
                prop_assert!((count - 1) >> core.eax == 0);
                prop_assert_eq!(get(&leaves, function, 0).eax, 0, "one thread per core");
                prop_assert_eq!(get(&leaves, function, 2).ebx, 0);
            }
            prop_assert_eq!(get(&leaves, 4, 0).eax >> 14 & 0xfff, 0);
            prop_assert_eq!(get(&leaves, 4, 3).eax >> 14 & 0xfff, count - 1);
            prop_assert_eq!(get(&leaves, 4, 4).eax, 0);
            prop_assert_eq!(get(&leaves, 0x8000_001d, 3).eax >> 14, count - 1);
            prop_assert_eq!(get(&leaves, 0x8000_0008, 0).ecx & 0xff, count - 1);
            prop_assert_eq!(get(&leaves, 0x8000_001e, 0).eax, index);
            prop_assert_eq!(get(&leaves, 0x8000_0001, 0).ecx & EXT1_ECX_SVM, 0);
            prop_assert_eq!(get(&leaves, 0x8000_000a, 0).eax, 0);
            prop_assert_eq!(get(&leaves, HYPERVISOR_TIMING, 0).eax, 2_000_000);
            prop_assert_eq!(get(&leaves, HYPERVISOR_BASE, 0).eax, HYPERVISOR_TIMING);
        }
    }

    #[test]
    fn what_the_host_lacks_is_not_made_up() {
        let mut leaves = host();
        leaves[0].eax = 0xa;
        shape(&mut leaves, 0, 1, Features::default());
        assert!(
            leaves
                .iter()
                .all(|l| !matches!(l.function, 0xb | 0x1f | HYPERVISOR_TIMING))
        );
        assert_eq!(get(&leaves, 1, 0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        assert_eq!(id_bits(1), 0);
        assert_eq!(id_bits(2), 1);
        assert_eq!(id_bits(3), 2);
        assert_eq!(id_bits(254), 8);
    }
}

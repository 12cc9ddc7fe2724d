//! Jobs of the thread that plugs and unplugs memory, with a hypervisor and devices that fail at
//! each step: all of a job is done or nothing, and nobody is left to reach what is gone.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::hotplug::Mail;
use crate::memory::{GuestRam, MIN_MEMORY};

type Numbers = BTreeSet<usize>;

/// KVM's slots of the area.
struct Guest {
    first_slot: u32,
    slots: Mutex<Numbers>,
    /// The region that it fails to give or to take, once.
    fails: Mutex<Option<(usize, bool)>>,
    /// Who must have let go of what is taken away, when a guest was told of it.
    devices: Vec<Arc<Process>>,
    told: Numbers,
}

impl Slots for Guest {
    fn set_region(&self, region: &RamRegion, present: bool) -> Result<(), String> {
        let number = (region.slot - self.first_slot) as usize;
        if lock(&self.fails)
            .take_if(|it| *it == (number, present))
            .is_some()
        {
            return Err("KVM_SET_USER_MEMORY_REGION: no memory".to_owned());
        }
        let mut slots = lock(&self.slots);
        if present {
            slots.insert(number);
            return Ok(());
        }
        slots.remove(&number);
        if self.told.contains(&number) {
            for device in &self.devices {
                assert!(!lock(&device.maps).contains(&number), "{number} is mapped");
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Conduct {
    Serves,
    /// Has no place for what is new.
    Full,
    /// Is lost at the first word of a job, and ends after so many looks.
    Lost(usize),
    /// Is lost, and what it has in flight never ends.
    Stuck,
}

struct Process {
    area: Arc<Pluggable>,
    maps: Mutex<Numbers>,
    conduct: Conduct,
    /// How often was looked since it was lost; 0: it is not.
    looks: AtomicUsize,
}

impl Mapper for Process {
    fn sync_memory(&self) -> Result<(), String> {
        if self.looks.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let present: Numbers = (0..8).filter(|n| self.area.is_present(*n)).collect();
        let mut maps = lock(&self.maps);
        if matches!(self.conduct, Conduct::Lost(_) | Conduct::Stuck) {
            self.looks.store(1, Ordering::Relaxed);
            return Ok(());
        }
        maps.retain(|number| present.contains(number));
        if self.conduct == Conduct::Full && present != *maps {
            return Err("it has no slot left".to_owned());
        }
        *maps = present;
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        let looks = self.looks.load(Ordering::Relaxed);
        let Conduct::Lost(enough) = self.conduct else {
            return looks == 0;
        };
        if looks == 0 {
            return true;
        }
        self.looks.store(looks + 1, Ordering::Relaxed);
        let ended = looks > enough;
        if ended {
            // With the process goes what it mapped.
            lock(&self.maps).clear();
        }
        ended
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Bed {
    ram: GuestRam,
    guest: Arc<Guest>,
    processes: Vec<Arc<Process>>,
    worker: Worker,
}

impl Bed {
    /// An area whose regions `there` are plugged, known to the guest and to every process.
    fn new(there: &Numbers, conducts: &[Conduct], fails: Option<(usize, bool)>) -> Self {
        let ram = GuestRam::with_pluggable(MIN_MEMORY, MIN_MEMORY + (768 << 20)).unwrap();
        let area = Arc::clone(ram.pluggable().unwrap());
        for number in there {
            area.set_present(*number, true);
        }
        let process = |conduct: &Conduct| {
            Arc::new(Process {
                area: Arc::clone(&area),
                maps: Mutex::new(there.clone()),
                conduct: *conduct,
                looks: AtomicUsize::new(0),
            })
        };
        let processes: Vec<_> = conducts.iter().map(process).collect();
        let guest = Arc::new(Guest {
            first_slot: area.region(0).unwrap().slot,
            slots: Mutex::new(there.clone()),
            fails: Mutex::new(fails),
            devices: processes.clone(),
            told: there.clone(),
        });
        let worker = Worker {
            area,
            kvm: Arc::clone(&guest) as _,
            post: Mail::new().unwrap().post(),
            patience: Duration::from_millis(30),
        };
        Self {
            ram,
            guest,
            processes,
            worker,
        }
    }

    fn carry_out(&self, add: &Numbers, remove: &Numbers) -> Result<(), String> {
        let blocks: Vec<_> = self.worker.area.blocks_of_regions().collect();
        let job = Job {
            add: add.iter().copied().collect(),
            punch: remove.iter().map(|n| blocks[*n].clone()).collect(),
            remove: remove.iter().copied().collect(),
        };
        let listener = |(number, process): (usize, &Arc<Process>)| {
            let process = Arc::clone(process);
            (format!("disk{number}"), process as Arc<dyn Mapper>)
        };
        let listeners = self.processes.iter().enumerate().map(listener).collect();
        self.worker.carry_out(&Order { job, listeners })
    }

    fn present(&self) -> Numbers {
        (0..8).filter(|n| self.worker.area.is_present(*n)).collect()
    }

    fn slots(&self) -> Numbers {
        lock(&self.guest.slots).clone()
    }

    /// A byte that the guest has written at the beginning of a region.
    fn byte(&self, number: usize) -> GuestAddress {
        GuestAddress(self.worker.area.region(number).unwrap().guest_base)
    }
}

fn numbers(list: &[usize]) -> Numbers {
    list.iter().copied().collect()
}

#[test]
fn memory_that_one_device_has_no_place_for_is_taken_from_all() {
    let there = numbers(&[0]);
    let bed = Bed::new(&there, &[Conduct::Serves, Conduct::Full], None);
    bed.ram.all().write_obj(7_u8, bed.byte(1)).unwrap();
    let why = bed
        .carry_out(&numbers(&[1, 2]), &Numbers::new())
        .unwrap_err();
    assert!(
        why.contains("disk1") && why.contains("no slot left"),
        "{why}"
    );
    assert_eq!((bed.present(), bed.slots()), (there.clone(), there.clone()));
    for process in &bed.processes {
        assert_eq!(*lock(&process.maps), there);
    }
    let left: u8 = bed.ram.all().read_obj(bed.byte(1)).unwrap();
    assert_eq!(left, 0, "its pages are the host's again");
}

#[test]
fn memory_that_a_lost_process_may_still_write_to_stays_the_guests() {
    let there = numbers(&[0, 1]);
    let conducts = [Conduct::Full, Conduct::Stuck, Conduct::Serves];
    let bed = Bed::new(&there, &conducts, None);
    bed.ram.all().write_obj(7_u8, bed.byte(1)).unwrap();
    let why = bed.carry_out(&Numbers::new(), &numbers(&[1])).unwrap_err();
    assert!(
        why.contains("disk1") && why.contains("does not end"),
        "{why}"
    );
    assert_eq!((bed.present(), bed.slots()), (there.clone(), there.clone()));
    // Though the first has no place for it any more.
    assert_eq!(*lock(&bed.processes[2].maps), there, "it is told again");
    let left: u8 = bed.ram.all().read_obj(bed.byte(1)).unwrap();
    assert_eq!(left, 7, "nothing of it is lost");
}

fn conducts() -> impl Strategy<Value = Conduct> {
    prop_oneof![
        4 => Just(Conduct::Serves),
        1 => Just(Conduct::Full),
        1 => (0_usize..3).prop_map(Conduct::Lost),
        1 => Just(Conduct::Stuck),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_job_is_done_by_all_or_by_none(
        there in proptest::bits::u8::between(0, 6),
        chosen in proptest::bits::u8::between(0, 6),
        plug in any::<bool>(),
        conducts in proptest::collection::vec(conducts(), 0..4),
        fails in proptest::option::of(0_usize..6),
    ) {
        let set = |bits: u8| (0..6).filter(|n| bits & (1 << n) != 0).collect::<Numbers>();
        let (there, chosen) = (set(there), set(chosen));
        let (add, remove, wanted): (Numbers, Numbers, Numbers) = match plug {
            true => (&chosen - &there, Numbers::new(), &there | &chosen),
            false => (Numbers::new(), &there & &chosen, &there - &chosen),
        };
        // What is put back is not failed, too: of that there is no way back.
        let bed = Bed::new(&there, &conducts, fails.map(|number| (number, plug)));
        let done = bed.carry_out(&add, &remove);
        let present = bed.present();
        prop_assert_eq!(&present, if done.is_ok() { &wanted } else { &there });
        prop_assert_eq!(&bed.slots(), &present);
        for process in &bed.processes {
            let maps = lock(&process.maps).clone();
            match process.conduct {
                Conduct::Serves => prop_assert_eq!(&maps, &present),
                // Not what is gone, nor, when all is done, less than there is.
                Conduct::Full => {
                    prop_assert!(maps.is_subset(&present));
                    prop_assert!(done.is_err() || maps == present);
                }
                Conduct::Lost(_) | Conduct::Stuck => {
                    let idle = add.is_empty() && remove.is_empty();
                    prop_assert!(done.is_err() || idle || maps.is_empty());
                }
            }
        }
    }
}

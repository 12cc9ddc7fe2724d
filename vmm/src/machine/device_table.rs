//! The machine's devices, each under a number that stays its own while it exists: epoll
//! tokens carry it. The number of a device that is gone is given to another one only once
//! [`DeviceTable::settle`] was called, so that no event of the past is taken for its. Owned by
//! the manager thread.

use super::device::Device;

/// Devices by their numbers.
#[derive(Default)]
pub struct DeviceTable {
    slots: Vec<Option<Device>>,
    /// Numbers that may be given again.
    free: Vec<usize>,
    /// Numbers that may be given again after the events at hand.
    vacated: Vec<usize>,
}

impl DeviceTable {
    /// Takes a device in. Its number comes back.
    pub fn push(&mut self, device: Device) -> usize {
        match self.free.pop() {
            Some(index) => {
                if let Some(slot) = self.slots.get_mut(index) {
                    *slot = Some(device);
                }
                index
            }
            None => {
                self.slots.push(Some(device));
                self.slots.len().saturating_sub(1)
            }
        }
    }

    /// Takes a device out.
    pub fn take(&mut self, index: usize) -> Option<Device> {
        let device = self.slots.get_mut(index)?.take()?;
        self.vacated.push(index);
        Some(device)
    }

    /// Every event that was collected before has been handled.
    pub fn settle(&mut self) {
        self.free.append(&mut self.vacated);
    }

    /// The device of a number.
    pub fn get(&self, index: usize) -> Option<&Device> {
        self.slots.get(index)?.as_ref()
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Device> {
        self.slots.get_mut(index)?.as_mut()
    }

    /// One more than the highest number.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Every device.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.slots.iter().flatten()
    }

    /// The same, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Device> {
        self.slots.iter_mut().flatten()
    }

    /// Every device with its number.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &Device)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }

    /// The same, to be changed.
    pub fn numbered_mut(&mut self) -> impl Iterator<Item = (usize, &mut Device)> {
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(|(index, slot)| Some((index, slot.as_mut()?)))
    }

    /// The number of the first device that is meant.
    pub fn position(&self, mut meant: impl FnMut(&Device) -> bool) -> Option<usize> {
        self.numbered()
            .find(|(_, device)| meant(device))
            .map(|(index, _)| index)
    }
}

impl From<Vec<Device>> for DeviceTable {
    fn from(devices: Vec<Device>) -> Self {
        Self {
            slots: devices.into_iter().map(Some).collect(),
            ..Self::default()
        }
    }
}

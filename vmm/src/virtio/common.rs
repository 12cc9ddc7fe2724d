//! The common configuration structure as a register file (VIRTIO 1.2 section 4.1.4.3) and
//! the device status state machine (section 3.1). Pure state: what a write demands of the
//! device is returned as an [`Effect`], so that any sequence of accesses can be tested.
//!
//! Used by vCPU threads under the function's lock.

use super::registers::{F_VERSION_1, common as reg, status};
use crate::pci::NO_VECTOR;

/// What a register write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing beyond the register.
    None,
    /// The driver wrote 0 to the status: stop and forget everything.
    Reset,
    /// The driver set DRIVER_OK.
    Activate,
    /// The configuration change vector.
    ConfigVector(u16),
    /// A queue's vector.
    QueueVector {
        /// Which queue.
        queue: u16,
        /// Its new vector or [`NO_VECTOR`].
        vector: u16,
    },
}

/// One queue as the driver set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Size in descriptors.
    pub size: u16,
    /// MSI-X vector or [`NO_VECTOR`].
    pub vector: u16,
    /// The driver wants it used.
    pub enabled: bool,
    /// Descriptor area.
    pub descriptor: u64,
    /// Driver area: the available ring.
    pub driver: u64,
    /// Device area: the used ring.
    pub device: u64,
}

/// The register file.
pub struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
    max_size: u16,
    vectors: u16,
    usable: bool,
}

impl CommonConfig {
    /// The registers after a reset.
    pub fn new(offered: u64, queues: u16, max_size: u16, vectors: u16) -> Self {
        let queue = Queue {
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptor: 0,
            driver: 0,
            device: 0,
        };
        Self {
            offered,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(queues)],
            max_size,
            vectors,
            usable: true,
        }
    }

    /// Back to the state after a reset.
    pub fn reset(&mut self) {
        let (queues, usable) = (u16::try_from(self.queues.len()).unwrap_or(0), self.usable);
        *self = Self::new(self.offered, queues, self.max_size, self.vectors);
        self.usable = usable;
    }

    /// Whether there is a device behind the registers. Without one FEATURES_OK is not
    /// granted, so that a driver gives up cleanly.
    pub fn set_usable(&mut self, usable: bool) {
        self.usable = usable;
    }

    /// Another device is behind the registers, which offers this: what a driver reads from
    /// now on.
    pub fn set_offered(&mut self, offered: u64) {
        self.offered = offered;
    }

    /// The status as the driver wrote it.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the driver has taken the device into use.
    pub fn driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// The features that the driver accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// All queues by index.
    pub fn queues(&self) -> impl Iterator<Item = (u16, &Queue)> {
        (0..).zip(&self.queues)
    }

    /// Answers a read. `needs_reset` is shown in the status of a device in use,
    /// `generation` as config_generation.
    pub fn read(&self, offset: u64, data: &mut [u8], needs_reset: bool, generation: u8) {
        let image = self.image(needs_reset, generation);
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(image.iter().skip(start)) {
            *to = *from;
        }
    }

    fn image(&self, needs_reset: bool, generation: u8) -> [u8; reg::LENGTH as usize] {
        let mut image = [0; reg::LENGTH as usize];
        let mut put = |offset: u64, bytes: &[u8]| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (to, from) in image.iter_mut().skip(start).zip(bytes) {
                *to = *from;
            }
        };
        let mut shown = self.status;
        if needs_reset && shown != 0 {
            shown |= status::NEEDS_RESET;
        }
        put(
            reg::DEVICE_FEATURE_SELECT,
            &self.device_select.to_le_bytes(),
        );
        put(
            reg::DEVICE_FEATURE,
            &half(self.offered, self.device_select).to_le_bytes(),
        );
        put(
            reg::DRIVER_FEATURE_SELECT,
            &self.driver_select.to_le_bytes(),
        );
        put(
            reg::DRIVER_FEATURE,
            &half(self.accepted, self.driver_select).to_le_bytes(),
        );
        put(reg::CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        put(reg::NUM_QUEUES, &queues.to_le_bytes());
        put(reg::DEVICE_STATUS, &[shown, generation]);
        put(reg::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 and no vector.
        put(reg::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(reg::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(reg::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(reg::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(reg::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(reg::QUEUE_DESC, &queue.descriptor.to_le_bytes());
            put(reg::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(reg::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        image
    }

    /// Takes a write. Only accesses of a field's own width count, and halves of a 64-bit
    /// field (section 4.1.3.1); all others are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match *data {
            [value] if offset == reg::DEVICE_STATUS => return self.write_status(value),
            [a, b] => return self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.write_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_address(offset.saturating_add(4), u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Only a reset clears bits, and NEEDS_RESET is the device's.
        let new = value & !status::NEEDS_RESET & !self.status;
        self.status |= new & !(status::FEATURES_OK | status::DRIVER_OK);
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0;
        if new & status::FEATURES_OK != 0 && acceptable && self.usable {
            self.status |= status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            return Effect::Activate;
        }
        Effect::None
    }

    fn write_u16(&mut self, offset: u64, value: u16) -> Effect {
        let vector = if value < self.vectors {
            value
        } else {
            NO_VECTOR
        };
        let running = self.driver_ok();
        let selected = self.queue_select;
        match offset {
            reg::CONFIG_VECTOR => {
                self.config_vector = vector;
                return Effect::ConfigVector(vector);
            }
            reg::QUEUE_SELECT => self.queue_select = value,
            _ => {}
        }
        let max_size = self.max_size;
        let Some(queue) = self.queues.get_mut(usize::from(selected)) else {
            return Effect::None;
        };
        match offset {
            reg::QUEUE_VECTOR => {
                queue.vector = vector;
                return Effect::QueueVector {
                    queue: selected,
                    vector,
                };
            }
            reg::QUEUE_SIZE if !queue.enabled && value.is_power_of_two() && value <= max_size => {
                queue.size = value;
            }
            // Enabled once, disabled only by a reset; a queue enabled after DRIVER_OK is
            // one that the driver was not allowed to enable.
            reg::QUEUE_ENABLE if value == 1 && !running => queue.enabled = true,
            _ => {}
        }
        Effect::None
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURE_SELECT => self.device_select = value,
            reg::DRIVER_FEATURE_SELECT => self.driver_select = value,
            reg::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => {
                let (low, high) = (half(self.accepted, 0), half(self.accepted, 1));
                match self.driver_select {
                    0 => self.accepted = join(value, high),
                    1 => self.accepted = join(low, value),
                    _ => {}
                }
            }
            _ => self.write_address(offset, value),
        }
    }

    fn write_address(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled || !offset.is_multiple_of(4) {
            return;
        }
        let field = match offset & !7 {
            reg::QUEUE_DESC => &mut queue.descriptor,
            reg::QUEUE_DRIVER => &mut queue.driver,
            reg::QUEUE_DEVICE => &mut queue.device,
            _ => return,
        };
        *field = match offset & 7 {
            0 => join(value, half(*field, 1)),
            _ => join(half(*field, 0), value),
        };
    }
}

/// The low (0) or high (1) half; 0 for any other selection.
fn half(value: u64, which: u32) -> u32 {
    match which {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
#[path = "common_tests.rs"]
mod tests;

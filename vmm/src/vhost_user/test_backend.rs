//! A well-behaved back-end for tests: the `vhost` crate's request handler, which knows
//! nothing of our front-end, with a device that records what it is told.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};

/// The region as it was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub guest: u64,
    pub size: u64,
    pub user: u64,
    pub offset: u64,
}

/// One queue as the device knows it.
#[derive(Default)]
pub struct Ring {
    pub size: u32,
    pub addresses: Option<[u64; 3]>,
    pub base: Option<u32>,
    pub kick: Option<File>,
    pub call: Option<File>,
    pub error: Option<File>,
    pub enabled: bool,
}

/// What the device was told.
pub struct Recorder {
    pub offered: u64,
    pub protocol: VhostUserProtocolFeatures,
    pub queues: u64,
    pub config: Vec<u8>,
    /// Requests that the device refuses from now on.
    pub refuse: Option<&'static str>,
    /// The message with this number ends the device before it is answered.
    pub dies_at: Option<usize>,
    /// What it says before it answers the message with this number.
    pub garbage_at: Option<(usize, Vec<u8>)>,
    socket: UnixStream,
    /// Changes the answer to GET_INFLIGHT_FD.
    pub spoil_inflight: fn(&mut VhostUserInflight),
    /// What SET_INFLIGHT_FD brought.
    pub inflight: Option<(VhostUserInflight, File)>,
    pub features: u64,
    pub regions: Vec<Region>,
    pub rings: Vec<Ring>,
    pub channel: Option<Backend>,
    pub log: Vec<&'static str>,
}

/// A back-end that runs in a thread until its front-end hangs up.
pub struct TestBackend {
    pub recorder: Arc<Mutex<Recorder>>,
    thread: Option<JoinHandle<()>>,
    socket: UnixStream,
}

/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, and two bits of a device type.
pub const FEATURES: u64 = 1 << 32 | 1 << 30 | 0x42;

impl TestBackend {
    /// A device with two queues and `config`, and the front-end's end of its socket.
    pub fn start(config: &[u8]) -> (Self, UnixStream) {
        Self::start_with(config, |_| {})
    }

    /// The same, changed before it starts.
    pub fn start_with(config: &[u8], change: impl FnOnce(&mut Recorder)) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut recorder = Recorder {
            offered: FEATURES,
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            queues: 2,
            config: config.to_vec(),
            refuse: None,
            dies_at: None,
            garbage_at: None,
            socket: theirs.try_clone().unwrap(),
            spoil_inflight: |_| {},
            inflight: None,
            features: 0,
            regions: Vec::new(),
            rings: (0..2).map(|_| Ring::default()).collect(),
            channel: None,
            log: Vec::new(),
        };
        change(&mut recorder);
        let recorder = Arc::new(Mutex::new(recorder));
        let socket = theirs.try_clone().unwrap();
        let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&recorder));
        let ours_to_end = socket.try_clone().unwrap();
        let serve = move || {
            while let Ok(()) | Err(Error::InvalidParam) = handler.handle_request() {}
            let _ = ours_to_end.shutdown(std::net::Shutdown::Both);
        };
        let thread = Some(std::thread::spawn(serve));
        let backend = Self {
            recorder,
            thread,
            socket,
        };
        (backend, ours)
    }

    pub fn lock(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap()
    }

    /// It will say no more, and lives.
    pub fn close_half(&self) {
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// What a dying process does.
    pub fn die(&self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

impl Drop for TestBackend {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A memfd that cannot shrink.
pub fn sealed_memfd(size: u64) -> File {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create(c"inflight", flags).unwrap());
    file.set_len(size).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    file
}

impl Recorder {
    fn note(&mut self, what: &'static str) -> Result<()> {
        if self.dies_at == Some(self.log.len()) {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
            return Err(Error::Disconnected);
        }
        if let Some((_, garbage)) = self.garbage_at.take_if(|(at, _)| *at == self.log.len()) {
            let _ = (&self.socket).write_all(&garbage);
        }
        self.log.push(what);
        if self.refuse == Some(what) {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn ring(&mut self, index: usize) -> Result<&mut Ring> {
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for Recorder {
    fn set_owner(&mut self) -> Result<()> {
        self.note("SET_OWNER")
    }
    fn reset_owner(&mut self) -> Result<()> {
        self.note("RESET_OWNER")
    }
    fn reset_device(&mut self) -> Result<()> {
        self.note("RESET_DEVICE")
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.note("SET_FEATURES")
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.regions = regions
            .iter()
            .map(|region| Region {
                guest: region.guest_phys_addr,
                size: region.memory_size,
                user: region.user_addr,
                offset: region.mmap_offset,
            })
            .collect();
        self.note("SET_MEM_TABLE").map(|()| None)
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index as usize)?.size = num;
        self.note("SET_VRING_NUM")
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
        self.ring(index as usize)?.addresses = Some([descriptor, used, available]);
        self.note("SET_VRING_ADDR")
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index as usize)?.base = Some(base);
        self.note("SET_VRING_BASE")
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.note("GET_VRING_BASE")?;
        *self.ring(index as usize)? = Ring::default();
        Ok(VhostUserVringState::new(index, 17))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.kick = fd;
        self.note("SET_VRING_KICK")
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = fd;
        self.note("SET_VRING_CALL")
    }
    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.error = fd;
        self.note("SET_VRING_ERR")
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.protocol)
    }
    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        self.note("SET_PROTOCOL_FEATURES")
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index as usize)?.enabled = enable;
        self.note("SET_VRING_ENABLE")
    }
    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        self.note("GET_CONFIG")?;
        let (start, size) = (offset as usize, size as usize);
        let bytes = self.config.get(start..start + size);
        Ok(bytes.ok_or(Error::InvalidParam)?.to_vec())
    }
    fn set_config(&mut self, offset: u32, data: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.note("SET_CONFIG")?;
        let start = offset as usize;
        let place = self.config.get_mut(start..start + data.len());
        place.ok_or(Error::InvalidParam)?.copy_from_slice(data);
        Ok(())
    }
    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.channel = Some(backend);
    }
    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        self.note("GPU_SET_SOCKET")
    }
    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }
    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.note("GET_INFLIGHT_FD")?;
        let size = u64::from(asked.num_queues) * (64 + 16 * u64::from(asked.queue_size));
        let file = sealed_memfd(size);
        let mut reply = *asked;
        reply.mmap_size = size;
        (self.spoil_inflight)(&mut reply);
        Ok((reply, file))
    }
    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        self.inflight = Some((*region, file));
        self.note("SET_INFLIGHT_FD")
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(8)
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        self.note("ADD_MEM_REG").map(|()| None)
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.note("REM_MEM_REG")
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }
    fn check_device_state(&mut self) -> Result<()> {
        self.note("CHECK_DEVICE_STATE")
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::default())
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        self.note("SET_LOG_BASE")
    }
}

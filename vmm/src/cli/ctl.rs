//! `bulkhead ctl`: a client of the API socket (service `bulkhead.v1.Machine`), with no
//! private way in. Runs in the user's own process; every call but a followed event stream
//! has a deadline.

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use bulkhead_proto::client::{Speaker, Subscription};
use bulkhead_proto::machine::{
    BootRequest, BootResponse, CreateRequest, CreateResponse, DeleteRequest, DeleteResponse,
    DevicesRequest, DevicesResponse, Event, EventsRequest, InfoRequest, InfoResponse, PauseRequest,
    PauseResponse, RebootRequest, RebootResponse, ResetRequest, ResetResponse, ResumeRequest,
    ResumeResponse, ShutdownRequest, ShutdownResponse,
};
use bulkhead_proto::protobuf::Message;
use bulkhead_proto::{BlockingClient, ClientError, MACHINE_SERVICE};

use super::ctl_console;
use super::ctl_device;
use super::ctl_hotplug::{self, Kind};
use super::ctl_operation;
use super::ctl_output as output;
use super::machine_args::MachineArgs;
use super::{EXIT_USAGE, fail};

/// Frames longer than this are no answer of a bulkhead.
const MAX_FRAME: u32 = 1024 * 1024;
const CONNECT: Duration = Duration::from_secs(10);
pub(super) const CALL: Duration = Duration::from_secs(30);
/// Creating a machine starts its device processes.
const CREATE: Duration = Duration::from_secs(120);
/// A reset waits for device processes, and reads the kernel again.
const RESET: Duration = Duration::from_secs(120);
/// How long a guest has to switch itself off unless the user says otherwise, and what the
/// VMM may take on top of it.
const SHUTDOWN_DEFAULT_SECONDS: u32 = 30;
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(30);

/// `bulkhead ctl`.
#[derive(clap::Args, Debug, Clone)]
pub struct CtlArgs {
    /// The API socket of the bulkhead to drive (what it was given as --api-socket)
    #[arg(
        long,
        short,
        global = true,
        value_name = "PATH",
        visible_alias = "api-socket",
        help_heading = "Connection"
    )]
    socket: Option<PathBuf>,
    /// Print JSON (events: one object per line)
    #[arg(long, global = true, help_heading = "Connection")]
    json: bool,
    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(clap::Subcommand, Debug, Clone)]
enum CtlCommand {
    /// Build the machine, without starting it
    Create(Box<MachineArgs>),
    /// Give up the machine with all that is its own; its process ends, too, if it has booted
    Delete,
    /// Start a machine that was created
    Boot,
    /// Stop the vCPUs between two instructions
    Pause,
    /// Let paused vCPUs go on
    Resume,
    /// Ask the guest to switch itself off; end it if it does not
    Shutdown {
        /// Do not ask the guest
        #[arg(long)]
        force: bool,
        /// Seconds the guest has before it is ended
        #[arg(
            long,
            value_name = "SECONDS",
            default_value_t = SHUTDOWN_DEFAULT_SECONDS,
            value_parser = clap::value_parser!(u32).range(1..=600)
        )]
        timeout: u32,
    },
    /// Reset the machine in place: the guest begins anew
    Reset,
    /// Ask the guest to switch itself off, and let it begin anew; reset it if it does not
    Reboot {
        /// Seconds the guest has before it is reset
        #[arg(
            long,
            value_name = "SECONDS",
            default_value_t = SHUTDOWN_DEFAULT_SECONDS,
            value_parser = clap::value_parser!(u32).range(1..=600)
        )]
        timeout: u32,
    },
    /// Show the machine: its state, configuration, processes and counters
    Info,
    /// Show the devices and the processes that serve them
    Devices,
    /// Show what a device has counted since its process started
    Stats(ctl_device::StatsArgs),
    /// Grow a disk or change its limits while it is in use
    UpdateDisk(ctl_device::UpdateDiskArgs),
    /// Change a network device's link or limits while it is in use
    UpdateNet(ctl_device::UpdateNetArgs),
    /// Tell the guest how large a console is
    ResizeConsole(ctl_device::ResizeConsoleArgs),
    /// Change what a device's process may use of the host: CPU, memory, threads, I/O
    Limit(super::resource_args::LimitArgs),
    /// Let a device finish what is in flight and take nothing new
    Drain(ctl_device::DrainArgs),
    /// Put a process of another binary in the place of a device's, while it is in use
    UpdateDevice(ctl_device::UpdateDeviceArgs),
    /// Let a drained device take requests again, or bring a quarantined one back
    ResumeDevice(ctl_device::ResumeDeviceArgs),
    /// Add a disk to the machine: path=FILE,id=NAME[,KEY=VALUE]…
    AddDisk(ctl_hotplug::AddArgs),
    /// Add a network device to the machine: tap=NAME,id=NAME[,KEY=VALUE]…
    AddNet(ctl_hotplug::AddArgs),
    /// Add a device of somebody else's to the machine: socket=PATH,kind=NAME,id=NAME[,KEY=VALUE]…
    AddVhostUser(ctl_hotplug::AddArgs),
    /// Add an entropy device to the machine: id=NAME[,KEY=VALUE]…
    AddRng(ctl_hotplug::AddArgs),
    /// Add the socket device to the machine: socket=PATH,id=NAME[,KEY=VALUE]…
    AddVsock(ctl_hotplug::AddArgs),
    /// Add consoles to the machine: socket=PATH,id=NAME[,KEY=VALUE]…
    AddConsole(ctl_hotplug::AddArgs),
    /// Add a directory of the host's to the machine: tag=NAME,source=DIR,id=NAME[,KEY=VALUE]…
    AddFs(ctl_hotplug::AddArgs),
    /// Have the guest give a device up, and end it
    RemoveDevice(ctl_hotplug::RemoveArgs),
    /// Change the number of vCPUs
    ResizeCpus(ctl_hotplug::ResizeCpusArgs),
    /// Ask the guest to have so much memory; `info` and events tell how far it has come
    ResizeMemory(ctl_hotplug::ResizeMemoryArgs),
    /// Show what became of what was asked for: devices, vCPUs and memory that come and go
    Operations(ctl_operation::OperationsArgs),
    /// Show what became of one operation, or wait for its end
    Operation(ctl_operation::OperationArgs),
    /// Read what the guest prints on a console, and type (Ctrl-] leaves)
    Console(ctl_console::ConsoleArgs),
    /// Show what has happened to the machine
    Events {
        /// First event wanted, by number [default: the oldest that is kept]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        from: Option<u64>,
        /// Go on with what happens, until the machine ends or you interrupt
        #[arg(long, short)]
        follow: bool,
    },
}

/// What went wrong, in one line.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: u8,
    pub(super) line: String,
}

impl Failure {
    pub(super) fn new(line: impl Into<String>) -> Self {
        Self {
            code: 1,
            line: line.into(),
        }
    }
}

/// Runs the command and prints its result on standard output.
pub fn run(args: CtlArgs) -> ExitCode {
    match execute(&args, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(failure.code, &failure.line),
    }
}

fn execute(args: &CtlArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.socket.as_deref().ok_or_else(|| Failure {
        code: EXIT_USAGE,
        line: "--socket PATH is missing: name the API socket of the bulkhead to drive".into(),
    })?;
    // Before connecting: a wrong option is the user's error whether or not anybody listens.
    args.command.check(args.json)?;
    let mut session = Session {
        client: connect(path)?,
        path,
    };
    let mut out = Output {
        json: args.json,
        to: out,
    };
    match &args.command {
        CtlCommand::Create(machine) => {
            let request = create_request(machine)?;
            session.call::<_, CreateResponse>("Create", &request, CREATE)?;
            out.state("created")
        }
        CtlCommand::Delete => {
            session.call::<_, DeleteResponse>("Delete", &DeleteRequest::new(), CREATE)?;
            out.state("none")
        }
        CtlCommand::Boot => {
            session.call::<_, BootResponse>("Boot", &BootRequest::new(), CALL)?;
            out.state("running")
        }
        CtlCommand::Pause => {
            session.call::<_, PauseResponse>("Pause", &PauseRequest::new(), CALL)?;
            out.state("paused")
        }
        CtlCommand::Resume => {
            session.call::<_, ResumeResponse>("Resume", &ResumeRequest::new(), CALL)?;
            out.state("running")
        }
        CtlCommand::Shutdown { force, timeout } => {
            let mut request = ShutdownRequest::new();
            request.force = *force;
            request.timeout_ms = timeout.saturating_mul(1000);
            let patience = Duration::from_secs(u64::from(*timeout)).saturating_add(SHUTDOWN_MARGIN);
            session.call::<_, ShutdownResponse>("Shutdown", &request, patience)?;
            out.state("stopped")
        }
        CtlCommand::Reset => {
            session.call::<_, ResetResponse>("Reset", &ResetRequest::new(), RESET)?;
            out.line(&serde_json::json!({ "reset": true }), "reset")
        }
        CtlCommand::Reboot { timeout } => {
            let mut request = RebootRequest::new();
            request.timeout_ms = timeout.saturating_mul(1000);
            let patience = Duration::from_secs(u64::from(*timeout)).saturating_add(RESET);
            let rebooted: RebootResponse = session.call("Reboot", &request, patience)?;
            let how = match rebooted.forced {
                true => "reset by force: the guest did not switch itself off in time",
                false => "rebooted",
            };
            let json =
                serde_json::json!({ "operation": rebooted.operation, "forced": rebooted.forced });
            out.line(&json, how)
        }
        CtlCommand::Info => {
            let info: InfoResponse = session.call("Info", &InfoRequest::new(), CALL)?;
            if out.json {
                out.json_value(&output::info_json(&info))
            } else {
                out.text(|to| output::info_text(to, &info))
            }
        }
        CtlCommand::Devices => {
            let devices: DevicesResponse = session.call("Devices", &DevicesRequest::new(), CALL)?;
            if out.json {
                out.json_value(&output::devices_json(&devices))
            } else {
                out.text(|to| output::devices_text(to, &devices))
            }
        }
        CtlCommand::Stats(stats) => stats.run(&mut session, &mut out),
        CtlCommand::UpdateDisk(update) => update.run(&mut session, &mut out),
        CtlCommand::UpdateNet(update) => update.run(&mut session, &mut out),
        CtlCommand::ResizeConsole(resize) => resize.run(&mut session, &mut out),
        CtlCommand::Limit(limit) => limit.run(&mut session, &mut out),
        CtlCommand::Drain(drain) => drain.run(&mut session, &mut out),
        CtlCommand::UpdateDevice(update) => update.run(&mut session, &mut out),
        CtlCommand::ResumeDevice(resume) => resume.run(&mut session, &mut out),
        CtlCommand::AddDisk(add) => add.run(Kind::Disk, &mut session, &mut out),
        CtlCommand::AddNet(add) => add.run(Kind::Net, &mut session, &mut out),
        CtlCommand::AddVhostUser(add) => add.run(Kind::VhostUser, &mut session, &mut out),
        CtlCommand::AddRng(add) => add.run(Kind::Rng, &mut session, &mut out),
        CtlCommand::AddVsock(add) => add.run(Kind::Vsock, &mut session, &mut out),
        CtlCommand::AddConsole(add) => add.run(Kind::Console, &mut session, &mut out),
        CtlCommand::AddFs(add) => add.run(Kind::Fs, &mut session, &mut out),
        CtlCommand::RemoveDevice(remove) => remove.run(&mut session, &mut out),
        CtlCommand::ResizeCpus(resize) => resize.run(&mut session, &mut out),
        CtlCommand::ResizeMemory(resize) => resize.run(&mut session, &mut out),
        CtlCommand::Operations(operations) => operations.run(&mut session, &mut out),
        CtlCommand::Operation(operation) => operation.run(&mut session, &mut out),
        CtlCommand::Console(console) => console.run(session, out.to),
        CtlCommand::Events { from, follow } => {
            session.events(from.unwrap_or(0), *follow, out.json, out.to)
        }
    }
}

fn create_request(machine: &MachineArgs) -> Result<CreateRequest, Failure> {
    let config = machine.to_config().map_err(|line| Failure {
        code: EXIT_USAGE,
        line,
    })?;
    let mut request = CreateRequest::new();
    request.config = Some(config).into();
    Ok(request)
}

impl CtlCommand {
    /// What can be said of the options without asking anybody.
    fn check(&self, json: bool) -> Result<(), Failure> {
        match self {
            Self::Console(console) => console.check(json),
            Self::Create(machine) => create_request(machine).map(|_| ()),
            Self::UpdateDisk(update) => update.request().map(|_| ()),
            Self::UpdateNet(update) => update.request().map(|_| ()),
            Self::AddDisk(add) => add.request(Kind::Disk).map(|_| ()),
            Self::AddNet(add) => add.request(Kind::Net).map(|_| ()),
            Self::AddVhostUser(add) => add.request(Kind::VhostUser).map(|_| ()),
            Self::AddRng(add) => add.request(Kind::Rng).map(|_| ()),
            Self::AddVsock(add) => add.request(Kind::Vsock).map(|_| ()),
            Self::AddConsole(add) => add.request(Kind::Console).map(|_| ()),
            Self::AddFs(add) => add.request(Kind::Fs).map(|_| ()),
            Self::ResizeConsole(resize) => resize.request().map(|_| ()),
            Self::Limit(limit) => limit.over(None).map(|_| ()),
            _ => Ok(()),
        }
    }
}

/// Where results go, and in which form.
pub(super) struct Output<'a> {
    pub(super) json: bool,
    to: &'a mut dyn Write,
}

impl Output<'_> {
    /// One of the two forms: JSON.
    pub(super) fn json_value(&mut self, value: &serde_json::Value) -> Result<(), Failure> {
        written(writeln!(self.to, "{value:#}"))
    }

    /// The other: text.
    pub(super) fn text(
        &mut self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Failure> {
        written(write(&mut *self.to))
    }

    /// The machine's state now.
    fn state(&mut self, state: &str) -> Result<(), Failure> {
        self.line(&serde_json::json!({ "state": state }), state)
    }

    /// What was done to a device.
    pub(super) fn done(&mut self, id: &str, what: &str) -> Result<(), Failure> {
        self.line(&serde_json::json!({ "id": id, "done": what }), what)
    }

    fn line(&mut self, json: &serde_json::Value, text: &str) -> Result<(), Failure> {
        if self.json {
            written(writeln!(self.to, "{json}"))
        } else {
            written(writeln!(self.to, "{text}"))
        }
    }
}

/// A reader that has seen enough (`… | head`) is no error.
fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::new(format!(
            "cannot write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// A call in which both speak, and what explains its errors.
type Conversation<Item, Explain> = (Speaker, Subscription<Item>, Explain);

/// A connection to the bulkhead that is driven.
pub(super) struct Session<'a> {
    client: BlockingClient,
    path: &'a Path,
}

impl<'a> Session<'a> {
    /// Calls a method.
    pub(super) fn call<Req: Message, Resp: Message>(
        &mut self,
        method: &str,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, Failure> {
        self.client
            .call(MACHINE_SERVICE, method, request, timeout)
            .map_err(|error| explain(self.path, &error))
    }

    /// Calls a method in which both speak, and waits for its first answer, which only says that it
    /// has begun. Errors that come later are explained by what comes with it.
    pub(super) fn converse<Req: Message, Item: Message>(
        self,
        method: &str,
        request: &Req,
    ) -> Result<Conversation<Item, impl Fn(&ClientError) -> Failure + use<'a, Req, Item>>, Failure>
    {
        let Self { client, path } = self;
        let (speaker, mut stream) = client
            .converse::<_, Item>(MACHINE_SERVICE, method, request, CALL)
            .map_err(|error| explain(path, &error))?;
        stream
            .next(Some(CALL))
            .map_err(|error| explain(path, &error))?;
        Ok((speaker, stream, move |error: &ClientError| {
            explain(path, error)
        }))
    }

    fn events(
        self,
        from: u64,
        follow: bool,
        json: bool,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        let Self { client, path } = self;
        let mut request = EventsRequest::new();
        request.from = from;
        request.backlog_only = !follow;
        request.gaps = true;
        let failed = |error: ClientError| explain(path, &error);
        let mut stream = client
            .subscribe(MACHINE_SERVICE, "Events", &request, CALL)
            .map_err(failed)?;
        let idle = (!follow).then_some(CALL);
        let mut last = None;
        loop {
            let event: Event = match (stream.next(idle), last) {
                (Ok(Some(event)), _) => event,
                (Ok(None), _) => return Ok(()),
                (Err(ClientError::Closed), Some(last)) => {
                    let name = path.display();
                    return Err(Failure::new(format!(
                        "{name}: closed after event {last}: bulkhead has ended, or this reader took nothing for too long: go on with --from {}",
                        u64::saturating_add(last, 1)
                    )));
                }
                (Err(error), _) => return Err(failed(error)),
            };
            last = Some(event.sequence);
            let line = if json {
                writeln!(out, "{}", output::event_json(&event))
            } else {
                writeln!(out, "{}", output::event_line(&event))
            };
            match line.and_then(|()| out.flush()) {
                Ok(()) => {}
                Err(error) => return written(Err(error)),
            }
        }
    }
}

/// Connects; the kernel alone would wait for ever on a bulkhead that does not accept.
fn connect(path: &Path) -> Result<BlockingClient, Failure> {
    let name = path.display();
    let (sender, receiver) = mpsc::channel();
    let target = path.to_owned();
    std::thread::spawn(move || {
        // If the receiver has given up, so has the program.
        let _ = sender.send(UnixStream::connect(target));
    });
    let stream = receiver.recv_timeout(CONNECT).map_err(|_| {
        Failure::new(format!(
            "{name}: no connection within {} s: bulkhead hangs or has too many clients",
            CONNECT.as_secs()
        ))
    })?;
    let stream = stream.map_err(|error| {
        Failure::new(match error.kind() {
            ErrorKind::NotFound => format!(
                "{name}: no such socket: start bulkhead with --api-socket {name}, or name the right one"
            ),
            // The kernel says the same of what never was one.
            ErrorKind::ConnectionRefused if !is_socket(path) => format!(
                "{name}: no socket: name that of bulkhead's --api-socket or --api-read-only"
            ),
            ErrorKind::ConnectionRefused => format!(
                "{name}: nobody listens there: the bulkhead that made it has ended; start it again"
            ),
            ErrorKind::PermissionDenied => format!(
                "{name}: no permission to connect: run this as the user who started bulkhead, as root, or as one whom --api-uid names, or --api-read-uid where the socket is that of --api-read-only"
            ),
            ErrorKind::InvalidInput => {
                format!("{name}: too long for a socket's path: at most 107 bytes are allowed")
            }
            _ => format!("{name}: cannot connect: {error}"),
        })
    })?;
    Ok(BlockingClient::new(stream, MAX_FRAME))
}

/// Unless it is known to be something else.
fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).map_or(true, |found| found.file_type().is_socket())
}

fn explain(path: &Path, error: &ClientError) -> Failure {
    let name = path.display();
    Failure::new(match error {
        ClientError::Status(status) => status.message.clone(),
        ClientError::Closed => format!(
            "{name}: bulkhead closed the connection without an answer: it has ended, or you are \
             neither its user nor root nor named by --api-uid, or by --api-read-uid where the \
             socket is that of --api-read-only"
        ),
        ClientError::Timeout(span) => {
            format!(
                "{name}: no answer within {} s: see bulkhead's own output",
                span.as_secs()
            )
        }
        ClientError::Oversize(_) | ClientError::Malformed(_) => {
            format!("{name}: {error}: is it a bulkhead's API socket?")
        }
        ClientError::Request(_) | ClientError::Busy(_) | ClientError::Io(_) => {
            format!("{name}: {error}")
        }
    })
}

#[cfg(test)]
#[path = "ctl_tests.rs"]
mod tests;

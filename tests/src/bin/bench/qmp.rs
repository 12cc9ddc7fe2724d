//! QEMU's monitor (QMP), as far as the benchmarks need it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long an answer may take.
const CALL: Duration = Duration::from_secs(120);

/// A session.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket that QEMU makes.
    ///
    /// # Errors
    /// Why not.
    pub fn connect(path: &str) -> Result<Self, String> {
        let stream = connect(path)?;
        let timeout = stream.set_read_timeout(Some(CALL));
        timeout.map_err(|e| e.to_string())?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        qmp.line(|line| line.get("QMP").is_some())?;
        qmp.call(json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    /// Reads until a line is the wanted one.
    ///
    /// # Errors
    /// It does not come.
    pub fn line(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        loop {
            let mut text = String::new();
            let read = self.reader.read_line(&mut text);
            if read.map_err(|e| format!("QMP: {e}"))? == 0 {
                return Err("QMP: closed".into());
            }
            let line: Value = serde_json::from_str(&text).map_err(|e| format!("QMP: {e}"))?;
            if wanted(&line) {
                return Ok(line);
            }
        }
    }

    /// Makes a call and gives what it returned.
    ///
    /// # Errors
    /// QEMU's.
    pub fn call(&mut self, command: Value) -> Result<Value, String> {
        let sent = writeln!(self.reader.get_mut(), "{command}");
        sent.map_err(|e| format!("QMP: {e}"))?;
        let is_answer = |line: &Value| line.get("return").is_some() || line.get("error").is_some();
        let mut answer = self.line(is_answer)?;
        match answer.get("error") {
            Some(error) => Err(format!("{command}: {error}")),
            None => Ok(answer["return"].take()),
        }
    }

    /// Waits for the end of a device that was asked to go.
    ///
    /// # Errors
    /// It does not end.
    pub fn deleted(&mut self, id: &str) -> Result<(), String> {
        let ended =
            |line: &Value| line["event"] == "DEVICE_DELETED" && line["data"]["device"] == id;
        self.line(ended).map(drop)
    }
}

/// Connects to a socket as soon as it is there.
///
/// # Errors
/// It does not come.
pub fn connect(path: &str) -> Result<UnixStream, String> {
    let end = Instant::now() + CALL;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => return Err(format!("{path}: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

//! Log lines on standard error, one line each: `bulkhead: LEVEL: text`. The level comes
//! from `--log` (error, warn, info, debug; default warn).

use std::io::Write;

struct StderrLogger;

impl log::Log for StderrLogger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let line: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(1000)
            .collect();
        let level = record.level().as_str().to_ascii_lowercase();
        // A closed standard error must not end a VM.
        // One write, so that lines of other processes do not come between.
        let line = format!("bulkhead: {level}: {line}\n");
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Installs the logger at `level`. A second call only changes the level.
pub fn init(level: log::LevelFilter) {
    static LOGGER: StderrLogger = StderrLogger;
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}

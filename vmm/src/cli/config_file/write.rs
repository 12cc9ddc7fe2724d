//! Prints a configuration as a file. Of every table the plain keys come first, as TOML wants it.

use std::fmt::Display;

use bulkhead_proto::protobuf::{Enum, EnumOrUnknown, MessageField};

use super::fields::{Fault, Fields, Number, Step};

/// One table that is being printed.
#[derive(Debug, Default)]
pub(super) struct Writer {
    /// Of the table, with a dot after it; empty for the file itself.
    prefix: String,
    plain: String,
    tables: String,
    always: bool,
}

impl Writer {
    /// The whole.
    pub(super) fn finish(self) -> String {
        self.plain + &self.tables
    }

    fn wanted(&mut self, has: bool) -> bool {
        std::mem::take(&mut self.always) || has
    }

    fn line(&mut self, key: &str, value: impl Display) {
        self.plain.push_str(&format!("{key} = {value}\n"));
    }

    fn list(&mut self, key: &str, values: impl Iterator<Item = String>) {
        let values: Vec<String> = values.collect();
        if self.wanted(!values.is_empty()) {
            self.line(key, format!("[{}]", values.join(", ")));
        }
    }

    fn enter<M>(
        &mut self,
        (open, key, close): (&str, &str, &str),
        value: &mut M,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        let name = format!("{}{key}", self.prefix);
        let mut inner = Self {
            prefix: format!("{name}."),
            ..Self::default()
        };
        of(&mut inner, value)?;
        // One that has nothing but tables is there by their names.
        if open == "[[" || !inner.plain.is_empty() || inner.tables.is_empty() {
            self.tables.push_str(&format!("\n{open}{name}{close}\n"));
        }
        self.tables.push_str(&inner.finish());
        Ok(())
    }
}

/// A text between quotes, as TOML has it.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// With the largest unit that leaves a whole number.
fn size(bytes: u64) -> String {
    let units = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
    let unit = units
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((shift, unit)) => format!("\"{}{unit}\"", bytes >> shift),
        None => bytes.to_string(),
    }
}

impl Fields for Writer {
    fn always(&mut self) -> &mut Self {
        self.always = true;
        self
    }

    fn fault(&self, what: &str) -> Fault {
        Fault {
            line: 0,
            text: format!("{}: {what}", self.prefix),
        }
    }

    fn text(&mut self, key: &'static str, value: &mut String) -> Step {
        if self.wanted(!value.is_empty()) {
            self.line(key, quoted(value));
        }
        Ok(())
    }

    fn texts(&mut self, key: &'static str, values: &mut Vec<String>) -> Step {
        self.list(key, values.iter().map(|value| quoted(value)));
        Ok(())
    }

    fn flag(&mut self, key: &'static str, value: &mut bool) -> Step {
        if self.wanted(*value) {
            self.line(key, *value);
        }
        Ok(())
    }

    fn number(&mut self, key: &'static str, value: &mut u32) -> Step {
        self.count(key, &mut u64::from(*value))
    }

    fn numbers<N: Number>(&mut self, key: &'static str, values: &mut Vec<N>) -> Step {
        self.list(key, values.iter().map(ToString::to_string));
        Ok(())
    }

    fn count(&mut self, key: &'static str, value: &mut u64) -> Step {
        if self.wanted(*value != 0) {
            self.line(key, *value);
        }
        Ok(())
    }

    fn size(&mut self, key: &'static str, value: &mut u64) -> Step {
        if self.wanted(*value != 0) {
            self.line(key, size(*value));
        }
        Ok(())
    }

    fn hex(&mut self, key: &'static str, value: &mut Vec<u8>, separator: &str) -> Step {
        if self.wanted(!value.is_empty()) {
            let bytes: Vec<String> = value.iter().map(|byte| format!("{byte:02x}")).collect();
            self.line(key, quoted(&bytes.join(separator)));
        }
        Ok(())
    }

    fn choice<E: Enum>(
        &mut self,
        key: &'static str,
        value: &mut EnumOrUnknown<E>,
        names: &[(&'static str, E)],
    ) -> Step {
        if !self.wanted(value.value() != 0) {
            return Ok(());
        }
        match names.iter().find(|(_, it)| it.value() == value.value()) {
            Some((name, _)) => self.line(key, quoted(name)),
            // Refused when it is read: validated configurations have none.
            None => self.line(key, value.value()),
        }
        Ok(())
    }

    fn section<M>(
        &mut self,
        key: &'static str,
        value: &mut M,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        self.enter(("[", key, "]"), value, of)
    }

    fn table<M: Default>(
        &mut self,
        key: &'static str,
        value: &mut MessageField<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        match value.as_mut() {
            Some(value) => self.enter(("[", key, "]"), value, of),
            None => Ok(()),
        }
    }

    fn tables<M: Default>(
        &mut self,
        key: &'static str,
        values: &mut Vec<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        for value in values {
            self.enter(("[[", key, "]]"), value, of)?;
        }
        Ok(())
    }
}

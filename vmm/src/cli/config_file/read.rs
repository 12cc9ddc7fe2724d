//! Reads a file's tables into a configuration: every key is known, once there, and of its type, or
//! the file is refused by the line.

use std::cell::RefCell;

use bulkhead_proto::protobuf::{Enum, EnumOrUnknown, MessageField};
use toml::de::{DeTable, DeValue};

use super::fields::{Fault, Fields, Number, Step};
use crate::cli::machine_args::parse_size;

/// The lines of a text, and on which what was found.
#[derive(Debug)]
pub(super) struct Source {
    /// Where each line but the first begins.
    begins: Vec<usize>,
    places: RefCell<Vec<(String, usize)>>,
}

impl Source {
    pub(super) fn new(text: &str) -> Self {
        let ends = text.match_indices('\n');
        Self {
            begins: ends.map(|(at, _)| at.saturating_add(1)).collect(),
            places: RefCell::default(),
        }
    }

    /// The line of an offset, from 1 on.
    pub(super) fn line(&self, offset: usize) -> usize {
        let before = self.begins.partition_point(|begin| *begin <= offset);
        before.saturating_add(1)
    }

    /// Each key and its offset.
    pub(super) fn places(self) -> Vec<(String, usize)> {
        let found = self.places.take();
        found
            .into_iter()
            .map(|(key, offset)| {
                let line = self.line(offset);
                (key, line)
            })
            .collect()
    }
}

/// One table that is being read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    source: &'a Source,
    /// None: it is not there, and nothing in it.
    table: Option<&'a DeTable<'a>>,
    /// Where it begins.
    offset: usize,
    /// Its own name; empty: the file itself.
    name: String,
    /// Keys that were asked for.
    known: Vec<&'static str>,
}

/// A value, where it is, and its full name.
struct Found<'a> {
    value: &'a DeValue<'a>,
    offset: usize,
    name: String,
}

impl<'a> Reader<'a> {
    /// Reads all of a table by its description.
    pub(super) fn whole<M>(
        source: &'a Source,
        table: Option<&'a DeTable<'a>>,
        (offset, name): (usize, String),
        value: &mut M,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        let mut reader = Reader {
            source,
            table,
            offset,
            name,
            known: Vec::new(),
        };
        of(&mut reader, value)?;
        reader.nothing_else()
    }

    /// Whatever nobody asked for is unknown.
    fn nothing_else(&self) -> Step {
        for key in self.table.into_iter().flat_map(|table| table.keys()) {
            if !self.known.contains(&key.get_ref().as_ref()) {
                return Err(Fault {
                    line: self.source.line(key.span().start),
                    text: format!(
                        "{} is unknown: the keys {} are {}",
                        short(&self.within(key.get_ref())),
                        if self.name.is_empty() {
                            "of a configuration".to_owned()
                        } else {
                            format!("of {}", self.name)
                        },
                        self.known.join(", ")
                    ),
                });
            }
        }
        Ok(())
    }

    fn within(&self, key: &str) -> String {
        match self.name.as_str() {
            "" => key.to_owned(),
            name => format!("{name}.{key}"),
        }
    }

    fn find(&mut self, key: &'static str) -> Option<Found<'a>> {
        self.known.push(key);
        let (at, value) = self.table?.get_key_value(key)?;
        let found = Found {
            value: value.get_ref(),
            offset: at.span().start,
            name: self.within(key),
        };
        self.note(&found.name, found.offset);
        Some(found)
    }

    fn note(&self, name: &str, offset: usize) {
        let mut places = self.source.places.borrow_mut();
        places.push((name.to_owned(), offset));
    }

    fn wrong(&self, found: &Found<'_>, wanted: &str) -> Fault {
        self.wrong_value(found, found.value, wanted)
    }

    fn wrong_value(&self, found: &Found<'_>, value: &DeValue<'_>, wanted: &str) -> Fault {
        let what = match value {
            DeValue::String(text) => format!("{:?}", short(text)),
            DeValue::Integer(number) => short(&number.to_string()),
            DeValue::Float(_) => "a fraction".to_owned(),
            DeValue::Boolean(value) => value.to_string(),
            DeValue::Datetime(_) => "a date".to_owned(),
            DeValue::Array(_) => "a list".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        };
        Fault {
            line: self.source.line(found.offset),
            text: format!("{} is {what}: give {wanted}", found.name),
        }
    }

    /// Every value of a list.
    fn each<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        read: impl Fn(&DeValue<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Fault> {
        let Some(found) = self.find(key) else {
            return Ok(None);
        };
        let DeValue::Array(values) = found.value else {
            return Err(self.wrong(&found, &format!("a list of {wanted}, in brackets")));
        };
        let read = |value: &DeValue<'_>| {
            let it = read(value);
            it.ok_or_else(|| self.wrong_value(&found, value, &format!("a list of {wanted}")))
        };
        let values: Result<Vec<T>, Fault> = values.iter().map(|v| read(v.get_ref())).collect();
        values.map(Some)
    }
}

/// What stands in a line of an error.
fn short(text: &str) -> String {
    const MOST: usize = 64;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn wide(value: &DeValue<'_>) -> Option<i128> {
    let number = value.as_integer()?;
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

/// Pairs of hexadecimal digits, all or none of them with a ':' between.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let joined = text.replace(':', "");
    let spelled = text.len() == joined.len()
        || text
            .split(':')
            .all(|pair| pair.len() == 2 && pair.is_ascii());
    let digits: Vec<u8> = joined
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    let fits = spelled && rest.is_empty() && !pairs.is_empty();
    fits.then(|| pairs.iter().map(|[high, low]| (high << 4) | low).collect())
}

impl Fields for Reader<'_> {
    fn always(&mut self) -> &mut Self {
        self
    }

    fn fault(&self, what: &str) -> Fault {
        Fault {
            line: self.source.line(self.offset),
            text: format!("{} {what}", self.name),
        }
    }

    fn text(&mut self, key: &'static str, value: &mut String) -> Step {
        if let Some(found) = self.find(key) {
            let text = found.value.as_str();
            *value = text
                .ok_or_else(|| self.wrong(&found, "a text, in quotes"))?
                .to_owned();
        }
        Ok(())
    }

    fn texts(&mut self, key: &'static str, values: &mut Vec<String>) -> Step {
        let read = |value: &DeValue<'_>| value.as_str().map(str::to_owned);
        if let Some(all) = self.each(key, "texts, in quotes", read)? {
            *values = all;
        }
        Ok(())
    }

    fn flag(&mut self, key: &'static str, value: &mut bool) -> Step {
        if let Some(found) = self.find(key) {
            let flag = found.value.as_bool();
            *value = flag.ok_or_else(|| self.wrong(&found, "true or false"))?;
        }
        Ok(())
    }

    fn number(&mut self, key: &'static str, value: &mut u32) -> Step {
        if let Some(found) = self.find(key) {
            let number = wide(found.value).and_then(u32::from_wide);
            let wanted = format!("a whole number, {}", u32::RANGE);
            *value = number.ok_or_else(|| self.wrong(&found, &wanted))?;
        }
        Ok(())
    }

    fn numbers<N: Number>(&mut self, key: &'static str, values: &mut Vec<N>) -> Step {
        let read = |value: &DeValue<'_>| wide(value).and_then(N::from_wide);
        let wanted = format!("whole numbers, {}", N::RANGE);
        if let Some(all) = self.each(key, &wanted, read)? {
            *values = all;
        }
        Ok(())
    }

    fn count(&mut self, key: &'static str, value: &mut u64) -> Step {
        if let Some(found) = self.find(key) {
            let number = wide(found.value).and_then(|wide| u64::try_from(wide).ok());
            *value = number.ok_or_else(|| self.wrong(&found, "a whole number from 0 on"))?;
        }
        Ok(())
    }

    fn size(&mut self, key: &'static str, value: &mut u64) -> Step {
        if let Some(found) = self.find(key) {
            let size = match found.value.as_str() {
                Some(text) => parse_size(text).ok(),
                None => wide(found.value).and_then(|wide| u64::try_from(wide).ok()),
            };
            *value = size.ok_or_else(|| {
                self.wrong(
                    &found,
                    "bytes, or a text with K, M, G or T such as \"512M\"",
                )
            })?;
        }
        Ok(())
    }

    fn hex(&mut self, key: &'static str, value: &mut Vec<u8>, _separator: &str) -> Step {
        if let Some(found) = self.find(key) {
            let bytes = found.value.as_str().and_then(from_hex);
            *value = bytes.ok_or_else(|| {
                self.wrong(
                    &found,
                    "two hexadecimal digits for each byte, in quotes, such as \"52:54:00:00:00:01\"",
                )
            })?;
        }
        Ok(())
    }

    fn choice<E: Enum>(
        &mut self,
        key: &'static str,
        value: &mut EnumOrUnknown<E>,
        names: &[(&'static str, E)],
    ) -> Step {
        if let Some(found) = self.find(key) {
            let text = found.value.as_str();
            let chosen = names.iter().find(|(name, _)| Some(*name) == text);
            let (_, chosen) = chosen.ok_or_else(|| {
                let all: Vec<String> = names.iter().map(|(name, _)| format!("{name:?}")).collect();
                self.wrong(&found, &format!("one of {}", all.join(", ")))
            })?;
            *value = (*chosen).into();
        }
        Ok(())
    }

    fn section<M>(
        &mut self,
        key: &'static str,
        value: &mut M,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        let (table, place) = match self.find(key) {
            Some(found) => {
                let table = found.value.as_table();
                let table = table.ok_or_else(|| self.wrong(&found, "a table, [NAME]"));
                (Some(table?), (found.offset, found.name))
            }
            None => (None, (0, self.within(key))),
        };
        Self::whole(self.source, table, place, value, of)
    }

    fn table<M: Default>(
        &mut self,
        key: &'static str,
        value: &mut MessageField<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        let there = self.table.is_some_and(|table| table.contains_key(key));
        if !there {
            self.known.push(key);
            return Ok(());
        }
        let mut message = M::default();
        self.section(key, &mut message, of)?;
        *value = MessageField::some(message);
        Ok(())
    }

    fn tables<M: Default>(
        &mut self,
        key: &'static str,
        values: &mut Vec<M>,
        of: fn(&mut Self, &mut M) -> Step,
    ) -> Step {
        let Some(found) = self.find(key) else {
            return Ok(());
        };
        let wanted = format!("a list of tables, each begun by [[{}]]", found.name);
        let DeValue::Array(tables) = found.value else {
            return Err(self.wrong(&found, &wanted));
        };
        for (index, table) in tables.iter().enumerate() {
            let name = format!("{}[{index}]", found.name);
            let offset = table.span().start;
            self.note(&name, offset);
            let table = table.get_ref().as_table();
            let table = table.ok_or_else(|| self.wrong(&found, &wanted))?;
            let mut message = M::default();
            Self::whole(self.source, Some(table), (offset, name), &mut message, of)?;
            values.push(message);
        }
        Ok(())
    }
}

//! For tests of command lines: what one comes to, and that no part of it can be spoiled.
#![allow(clippy::panic)]

use std::ffi::OsString;

use crate::program::{Command, UsageError};

/// What a command line without quoting comes to.
///
/// # Errors
/// It makes no sense, or is not one to serve by.
pub fn served<O>(
    parse: impl FnOnce(Vec<OsString>) -> Result<Command<O>, UsageError>,
    line: &str,
) -> Result<O, String> {
    match parse(line.split_whitespace().map(OsString::from).collect()) {
        Ok(Command::Serve(options)) => Ok(options),
        Ok(_) => Err("not to serve".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A line that makes sense makes none with any of these parts replaced; one that asks for help
/// does.
///
/// # Panics
/// When that is not so.
pub fn assert_whole<O>(
    parse: impl Fn(Vec<OsString>) -> Result<Command<O>, UsageError>,
    line: &str,
    replaced: &[(&str, &str)],
) {
    assert!(served(&parse, line).is_ok(), "{line}");
    for (from, to) in replaced {
        let spoiled = line.replacen(from, to, 1);
        assert!(spoiled != line, "no {from} in {line}");
        assert!(served(&parse, &spoiled).is_err(), "{spoiled}");
    }
    assert!(matches!(parse(vec!["-h".into()]), Ok(Command::Help)));
}

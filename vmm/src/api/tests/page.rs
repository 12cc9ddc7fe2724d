//! The page about the protocol (proto/README.md) and the service's own comments, held against what
//! is served.

use std::collections::BTreeSet;

use bulkhead_proto::Code;

use crate::api::events::CAPACITY;
use crate::api::limits::Limits;

const PAGE: &str = include_str!("../../../../proto/README.md");
const PROTO: &str = include_str!("../../../../proto/proto/machine.proto");

fn methods() -> BTreeSet<String> {
    let file = bulkhead_proto::machine::file_descriptor();
    let methods = file
        .services()
        .flat_map(|s| s.methods().collect::<Vec<_>>());
    methods.map(|m| m.proto().name().to_owned()).collect()
}

#[test]
fn every_method_says_what_becomes_of_it_when_it_is_called_again() {
    let rows: BTreeSet<String> = PAGE
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .map(|(method, _)| method.to_owned())
        .collect();
    assert_eq!(rows, methods());
    let mut comment = String::new();
    let mut said = BTreeSet::new();
    for line in PROTO.lines().map(str::trim) {
        if let Some(more) = line.strip_prefix("//") {
            comment.push_str(more);
            continue;
        }
        if let Some((method, _)) = line.strip_prefix("rpc ").and_then(|l| l.split_once('(')) {
            assert!(comment.contains(" Again:"), "{method}: {comment}");
            said.insert(method.to_owned());
        }
        comment.clear();
    }
    assert_eq!(said, methods());
}

#[test]
fn every_code_has_its_meaning_on_the_page() {
    for code in (1..=16).map(Code::from_wire) {
        let row = format!("| {} | ", code.name());
        let never = PAGE
            .lines()
            .any(|line| line.contains("are never answered") && line.contains(code.name()));
        assert_ne!(PAGE.contains(&row), never, "{code}");
    }
}

#[test]
fn the_bounds_on_the_page_are_those_in_force() {
    let limits = Limits::default();
    let bounds = [
        ("connections at once", limits.connections as u64),
        ("calls in flight", limits.calls as u64),
        ("calls that are not answered", limits.outstanding as u64),
        ("event streams", limits.subscriptions as u64),
        ("bytes of a request", limits.request.into()),
        ("bytes of an answer", limits.reply as u64),
        ("from where on it is not read", limits.backlog as u64),
        ("from where on it is cut off", limits.backlog_max as u64),
        ("may take nothing", limits.stall.as_secs()),
        ("that a call may take", limits.call_time.as_secs()),
        ("events that are kept", CAPACITY as u64),
    ];
    for (what, bound) in bounds {
        let told = format!("| {bound} |");
        let row = PAGE
            .lines()
            .find(|line| line.starts_with("| ") && line.contains(what));
        assert!(
            row.is_some_and(|row| row.ends_with(&told)),
            "{what} {bound}: {row:?}"
        );
    }
}

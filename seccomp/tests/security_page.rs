//! SECURITY.md links each promise to what shows it: all of that exists.
#![allow(clippy::unwrap_used)] // A test says so by panicking.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .into()
}

/// Every file below a directory, as one text.
fn all_text(directory: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &all_text(&path);
        } else if let Ok(more) = std::fs::read_to_string(&path) {
            text += &more;
        }
    }
    text
}

/// Why what a promise names is not there.
fn missing(named: &str, subjects: &str) -> Option<String> {
    let words: Vec<&str> = named.split(' ').collect();
    let subject = match words.as_slice() {
        ["$BULKHEAD_BIN/e2e", "--native", subject] => Some(*subject),
        words => words.iter().find_map(|word| word.strip_prefix("T=")),
    };
    match words.as_slice() {
        _ if subject.is_some() => {
            let subject = subject.unwrap();
            let known = [
                "subject: ",
                "SUBJECT: &str = ",
                "Test::short(",
                "Test::long(",
            ]
            .iter()
            .any(|before| subjects.contains(&format!("{before}\"{subject}\"")));
            (!known).then(|| format!("no end-to-end test has the subject {subject}"))
        }
        ["cargo", "test", "-p", name, rest @ ..] => {
            let directory = match *name {
                "bulkhead-blk" => "device-procs/blk",
                "bulkhead-net" => "device-procs/net",
                "bulkhead-mem" => "device-procs/mem",
                "bulkhead-rng" => "device-procs/rng",
                "bulkhead-vsock" => "device-procs/vsock",
                "bulkhead-console" => "device-procs/console",
                "bulkhead-runtime" => "device-procs/runtime",
                "bulkhead-seccomp" => "seccomp",
                "bulkhead-proto" => "proto",
                "bulkhead" => "vmm",
                other => return Some(format!("no crate {other}")),
            };
            let file = match rest {
                [] => directory.to_owned(),
                ["--test", test] => format!("{directory}/tests/{test}.rs"),
                other => return Some(format!("{other:?}")),
            };
            (!root().join(&file).exists()).then(|| format!("no {file}"))
        }
        [path] if path.contains('/') => {
            let there = [String::new(), ".rs".into()]
                .iter()
                .any(|end| root().join(format!("{path}{end}")).exists());
            (!there).then(|| format!("no {path}"))
        }
        ["bulkhead", "audit", ..] => None,
        ["make", target] => {
            let makefile = std::fs::read_to_string(root().join("Makefile")).unwrap_or_default();
            let target = format!("{target}:");
            let known = makefile.lines().any(|line| line.starts_with(&target));
            (!known).then(|| format!("no target {target}"))
        }
        [test] => {
            let file = root().join("seccomp/tests").join(format!("{test}.rs"));
            (!file.exists()).then(|| format!("no test {test}"))
        }
        _ => Some("neither a test nor a path".to_owned()),
    }
}

#[test]
fn what_shows_each_promise_exists() {
    let page = std::fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let table = page.split("## Promises").nth(1).unwrap();
    let table = table.split("## Not promised").next().unwrap();
    let subjects = all_text(&root().join("tests/src/bin/e2e"));
    let (mut promises, mut wrong) = (0, Vec::new());
    for line in table.lines().filter(|line| line.starts_with("| ")).skip(1) {
        promises += 1;
        let shown = line.trim_end_matches('|').rsplit('|').next().unwrap();
        // Every second piece stands between backticks.
        let named: Vec<&str> = shown.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "nothing shows it: {line}");
        for name in named {
            wrong.extend(missing(name, &subjects).map(|why| format!("{name}: {why}")));
        }
    }
    assert!(promises > 15, "{promises}");
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn what_is_not_there_is_missed() {
    for named in [
        "make e2e T=absent",
        "make absent",
        "cargo test -p bulkhead-absent",
        "cargo test -p bulkhead-seccomp --test absent",
        "vmm/src/absent",
        "absent",
    ] {
        assert!(missing(named, "subject: \"boot\"").is_some(), "{named}");
    }
    assert_eq!(missing("make e2e T=boot", "subject: \"boot\""), None);
}

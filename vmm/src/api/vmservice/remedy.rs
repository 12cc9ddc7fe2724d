//! Remedies in the words of `vmservice.VM`: the manager's are for clients of `bulkhead.v1.Machine`
//! and for the command line. Called on the `api` thread.

use bulkhead_proto::RpcStatus;

/// How the manager's line ends, and what a client of this service can do.
const REMEDIES: [(&str, &str); 2] = [
    ("boot it first", "call ResumeVM first"),
    (
        "create it with --memory size=SIZE,max=SIZE",
        "CreateVM makes it with all the memory that it may have: give more as memory_mb there",
    ),
];

/// A refusal of the manager's, for a client of this service.
pub(in crate::api) fn in_its_words(mut status: RpcStatus) -> RpcStatus {
    let own = |(theirs, ours): &(&str, &str)| {
        let start = status.message.strip_suffix(theirs)?;
        Some(format!("{start}{ours}"))
    };
    if let Some(line) = REMEDIES.iter().find_map(own) {
        status.message = line;
    }
    status
}

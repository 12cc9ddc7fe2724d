//! What the end-to-end tests share: a VMM under test, what its guest printed, and the
//! little runner that names each test and counts verdicts.

pub mod chaos;
pub mod fault;
pub mod host;
pub mod hostile;
pub mod inject;
pub mod kata;
pub mod runner;
pub mod vmm;

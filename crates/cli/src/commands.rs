//! One file per noun: help texts, arguments, and the glue to the client.

pub(crate) mod cluster;
pub(crate) mod completions;
pub(crate) mod context;
pub(crate) mod event;
pub(crate) mod host;
pub(crate) mod image;
pub(crate) mod lab;
pub(crate) mod network;
pub(crate) mod policy;
pub(crate) mod pool;
pub(crate) mod schedule;
pub(crate) mod selftest;
pub(crate) mod snapshot;
pub(crate) mod task;
pub(crate) mod team;
pub(crate) mod token;
pub(crate) mod vault;
pub(crate) mod vm;

//! Labs for real, with a stand-in for the binary. Needs root; every test has a lab of its own and removes it, also when it fails.

mod lifecycle;
mod links;
mod support;

//! The HTTP contract of the controller: DTOs of version 1, which status a code has, and the typed client.
//!
//! The routes themselves are annotated where they are served; a test there holds the served description against reality. Start with
//! [`v1`] and [`client::Client`].

pub mod client;
pub mod status;
pub mod v1;

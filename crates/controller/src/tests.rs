//! Tests over real listeners.

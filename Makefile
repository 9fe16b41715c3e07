# Two commands for newcomers; each does all its own set-up on a fresh Debian 12 or 13 that has a Rust toolchain.
#   make demo   a small cluster on this machine moves a VM three times, alive, and says what that cost
#   make test   every check and test, the same as CI
# Both need root (packages, network namespaces) and no standard input.

.PHONY: help demo test setup

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

demo: setup
	cargo build --locked --release --package godwit --package godwit-e2e --bins </dev/null
	images=$$(scripts/guest-image </dev/null) && \
	GODWIT_GUEST_KERNEL=$$(printf '%s\n' "$$images" | sed -n 1p) \
	GODWIT_GUEST_INITRD=$$(printf '%s\n' "$$images" | sed -n 2p) \
	GODWIT_QEMU_OTHER=$$(scripts/qemu-other </dev/null || true) \
	GODWIT_BIN=$${CARGO_TARGET_DIR:-$$PWD/target}/release/godwit \
	$${CARGO_TARGET_DIR:-$$PWD/target}/release/demo </dev/null

test: setup
	cargo xtask ci </dev/null

setup:
	scripts/setup </dev/null

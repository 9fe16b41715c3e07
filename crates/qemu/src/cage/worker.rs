//! What a worker of ours on one directory (`vault-worker`) renounces beyond its cage: all files but those in that directory.

use std::os::fd::BorrowedFd;

use landlock::{ABI, Access, AccessFs, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope};

/// Confines this thread, and all that it starts, to what is in a directory, or to no file at all. Where the kernel's landlock is older it does what it can; where it has none,
/// what the cage leaves is left.
///
/// # Errors
/// The kernel has landlock and refused the rules.
pub fn confine_to(directory: Option<BorrowedFd<'_>>) -> Result<(), RulesetError> {
    let all = AccessFs::from_all(ABI::V5);
    let ruleset = Ruleset::default().handle_access(all)?.scope(Scope::from_all(ABI::V6))?.create()?;
    let ruleset = match directory {
        Some(directory) => ruleset.add_rule(PathBeneath::new(directory, all))?,
        None => ruleset,
    };
    ruleset.restrict_self().map(drop)
}

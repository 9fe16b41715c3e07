//! What became of each generation of a VM: where it was to run, from when to when it did, why it was granted and why it ended. Written in the
//! transactions that change the VM, from the difference that they make.

use godwit_api::v1::ReignEnd;
use godwit_model::{Name, PastMove, PastMoves, RunState, UnixMillis, VmId};

use crate::clock;
use crate::db::{Batch, Db, Fault, Stored};
use crate::rows::{HistoryRow, Reign, TaskRow, VmRow};

/// Generations that are kept, the newest.
const KEPT: usize = 200;
/// Moves that a forecast learns from: what was longer ago says less.
const LEARNED: usize = 8;

/// Adds to `batch`, which takes the VM from `before` to `after`, what that means for its history. A generation that is issued in it is for `task`.
pub(crate) async fn note(db: &Db, batch: Batch, before: &VmRow, after: &VmRow, task: Option<&TaskRow>) -> Result<Batch, Fault> {
    let found = db.find::<HistoryRow>(&after.id.to_string()).await?;
    let mut row = found.as_ref().map_or_else(|| HistoryRow { vm: after.id, reigns: vec![] }, |found| found.row.clone());
    advance(&mut row.reigns, before, after, task, clock::now());
    Ok(match found {
        Some(found) if found.row == row => batch,
        Some(found) => batch.update(&Stored { row, ..found }),
        None if row.reigns.is_empty() => batch,
        None => batch.create(&row),
    })
}

/// The latest moves of a VM that is to go from `from` to `to`.
pub(crate) async fn past_moves(db: &Db, vm: VmId, from: &Name, to: &Name) -> Result<PastMoves, Fault> {
    let found = db.find::<HistoryRow>(&vm.to_string()).await?;
    Ok(found.map(|found| moves_of(&found.row.reigns, from, to)).unwrap_or_default())
}

fn moves_of(reigns: &[Reign], from: &Name, to: &Name) -> PastMoves {
    let ran: Vec<&Reign> = reigns.iter().filter(|reign| reign.began.is_some()).collect();
    // A host keeps the memory of a VM that left it while it ran; after a stop that memory is nobody's any more.
    let stopped = |reign: &Reign| matches!(reign.end, Some(ReignEnd::Stopped | ReignEnd::Crashed));
    let had = |host: &Name, until: usize| {
        let since = ran.iter().take(until).rev().take_while(|reign| !stopped(reign));
        since.filter(|reign| reign.end == Some(ReignEnd::Moved)).any(|reign| reign.host == *host)
    };
    let moves = ran.windows(2).enumerate().filter_map(|(position, pair)| match pair {
        [before, reign] => {
            let same_way = before.host == *from && reign.host == *to;
            reign.figures.map(|figures| PastMove { same_way, returned: had(&reign.host, position + 1), figures })
        }
        _ => None,
    });
    let mut moves: Vec<PastMove> = moves.collect();
    moves.reverse();
    moves.truncate(LEARNED);
    PastMoves { returns: had(to, ran.len()), moves }
}

fn advance(reigns: &mut Vec<Reign>, before: &VmRow, after: &VmRow, task: Option<&TaskRow>, now: UnixMillis) {
    if after.issued > before.issued {
        let host = after.granted.iter().find(|(_, granted)| granted.generation == after.issued).map(|(host, _)| host.clone());
        reigns.extend(host.map(|host| Reign {
            generation: after.issued,
            host,
            granted: now,
            began: None,
            ended: None,
            end: None,
            task: task.map(|task| task.id),
            kind: task.map(|task| task.work.kind().to_owned()).unwrap_or_default(),
            principal: task.map(|task| task.principal.clone()).unwrap_or_default(),
            reason: task.and_then(|task| task.reason.clone()),
            figures: None,
        }));
        reigns.drain(..reigns.len().saturating_sub(KEPT));
    }
    let mut end = |generation, how: ReignEnd| {
        let open = |reign: &&mut Reign| reign.generation == generation && reign.end.is_none();
        if let Some(reign) = reigns.iter_mut().find(open) {
            (reign.ended, reign.end) = (Some(now), Some(how));
        }
    };
    if after.generation > before.generation && before.has_process() {
        end(before.generation, ReignEnd::Moved);
    }
    if let Some(pending) = &before.pending
        && after.pending.as_ref() != Some(pending)
        && pending.generation > after.generation
    {
        end(pending.generation, ReignEnd::NotUsed);
    }
    if after.generation == before.generation && before.has_process() && !after.has_process() {
        end(after.generation, if after.state == RunState::Crashed { ReignEnd::Crashed } else { ReignEnd::Stopped });
    }
    if after.has_process() {
        let begun = reigns.iter_mut().find(|reign| reign.generation == after.generation);
        if let Some(reign) = begun {
            reign.began.get_or_insert(now);
            // It was believed to have ended, by a host that now knows better.
            (reign.ended, reign.end) = (None, None);
        }
    }
    if let Some(task) = task.filter(|task| task.figures.is_some()) {
        let brought = reigns.iter_mut().rev().find(|reign| reign.task == Some(task.id) && reign.generation <= after.generation);
        brought.into_iter().for_each(|reign| reign.figures = task.figures);
    }
}

#[cfg(test)]
mod tests {
    use godwit_model::{Generation, MigrationFigures, Millis, TaskId};

    use super::*;
    use crate::rows::PendingGrant;
    use crate::tests::support::{name, vm_row};

    #[test]
    fn each_generation_is_told_from_its_grant_to_its_end() {
        let (mut reigns, mut vm, mut now) = (vec![], vm_row(), UnixMillis(0));
        let task = TaskId::new(uuid::Uuid::nil());
        let mut step = |reigns: &mut Vec<Reign>, change: &dyn Fn(&mut VmRow)| {
            let before = vm.clone();
            change(&mut vm);
            now.0 += 1;
            advance(reigns, &before, &vm, None, now);
        };
        let grant = |to: &'static str| {
            move |vm: &mut VmRow| {
                let generation = vm.issue(&name(to), task);
                vm.pending = Some(PendingGrant { destination: name(to), generation, task });
            }
        };
        step(&mut reigns, &|vm| {
            vm.generation = vm.issue(&name("h1"), task);
            vm.host = Some(name("h1"));
        });
        step(&mut reigns, &|vm| vm.set_state(RunState::Running, UnixMillis(0)));
        // A move that fails, one that does not, and the end.
        step(&mut reigns, &grant("h2"));
        step(&mut reigns, &|vm| vm.pending = None);
        step(&mut reigns, &grant("h2"));
        step(&mut reigns, &|vm| {
            vm.generation = Generation(3);
            vm.host = Some(name("h2"));
            vm.pending = None;
        });
        step(&mut reigns, &|vm| vm.set_state(RunState::Crashed, UnixMillis(0)));
        let told: Vec<_> = reigns
            .iter()
            .map(|reign| {
                (
                    reign.generation.0,
                    reign.host.as_str(),
                    reign.granted.0,
                    reign.began.map(|at| at.0),
                    reign.ended.map(|at| at.0),
                    reign.end,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (1, "h1", 1, Some(2), Some(6), Some(ReignEnd::Moved)),
                (2, "h2", 3, None, Some(4), Some(ReignEnd::NotUsed)),
                (3, "h2", 5, Some(6), Some(7), Some(ReignEnd::Crashed)),
            ]
        );
    }

    #[test]
    fn moves_that_were_done_are_told_with_the_way_they_went() {
        let reign = |number: u64, host: &str, ran: bool, total: Option<u64>| Reign {
            generation: Generation(number),
            host: name(host),
            granted: UnixMillis(number),
            began: ran.then_some(UnixMillis(number)),
            ended: None,
            end: ran.then_some(ReignEnd::Moved),
            task: None,
            kind: String::new(),
            principal: String::new(),
            reason: None,
            figures: total.map(|total| MigrationFigures { total: Millis(total), ..MigrationFigures::default() }),
        };
        let mut reigns = [
            reign(1, "h1", true, None),
            reign(2, "h3", false, None),
            reign(3, "h2", true, Some(30)),
            reign(4, "h1", true, Some(40)),
        ];
        let told = |reigns: &[Reign], from: &str, to: &str| {
            let past = moves_of(reigns, &name(from), &name(to));
            let moves = past.moves.iter().map(|past| (past.same_way, past.returned, past.figures.total.get()));
            (past.returns, moves.collect::<Vec<_>>())
        };
        assert_eq!(told(&reigns, "h1", "h2"), (true, vec![(false, true, 40), (true, false, 30)]));
        assert_eq!(told(&reigns, "h2", "h1"), (true, vec![(true, true, 40), (false, false, 30)]));
        assert_eq!(told(&reigns, "h1", "h3"), (false, vec![(false, true, 40), (false, false, 30)]), "granted, and never used");
        reigns[2].end = Some(ReignEnd::Stopped);
        let past = moves_of(&reigns, &name("h1"), &name("h2"));
        assert!(!past.returns && !past.moves[0].returned, "it was started afresh in between: {past:?}");
        let many: Vec<Reign> = (0..30).map(|number| reign(number, "h1", true, Some(number))).collect();
        let past = moves_of(&many, &name("h1"), &name("h1"));
        assert_eq!((past.moves.len(), past.moves[0].figures.total), (LEARNED, Millis(29)));
    }
}

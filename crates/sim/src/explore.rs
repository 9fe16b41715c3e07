//! Visits every state that a model can reach, breadth first, and checks each; then checks that from each of them a good end can be reached by
//! steps that are no faults. States are told apart by a 64-bit hash: with ten million of them two are mistaken for one with odds of 3 in a
//! million.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// What can be explored.
pub trait Model {
    /// All that is so at one moment.
    type State: Clone + Debug + Hash;
    /// What can happen.
    type Step: Copy + Debug;

    /// Where every run begins.
    fn begin(&self) -> Self::State;
    /// Everything that can happen next, with what is so then.
    fn steps(&self, state: &Self::State, next: &mut Vec<(Self::Step, Self::State)>);
    /// Whether a step is a fault: what nobody can rely on for a good end.
    fn is_fault(&self, step: Self::Step) -> bool;
    /// The rule that a state breaks.
    fn broken(&self, state: &Self::State) -> Option<&'static str>;
    /// Whether nothing is left to be done and all is well.
    fn is_good_end(&self, state: &Self::State) -> bool;
}

/// A rule that was broken, and the shortest way there.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which rule.
    pub rule: &'static str,
    /// Step by step.
    pub trace: Vec<String>,
    /// What was so in the end.
    pub state: String,
}

/// What an exploration found.
#[derive(Clone, Debug)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Length of the longest shortest way to a state.
    pub depth: usize,
    /// States that are good ends.
    pub good_ends: usize,
    /// The first broken rule.
    pub violation: Option<Violation>,
    /// Whether there were more states than were allowed: then nothing is proven.
    pub cut_short: bool,
}

/// A state that cannot reach a good end without the help of a fault.
pub const NO_GOOD_END: &str = "a good end can always be reached";

/// Hashes are keys already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are hashed by `fingerprint`, as one u64");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Folds words into 128 bits by multiplication: several times as fast as the standard library's, which defends against attackers.
struct Folding(u64, u64);

impl Folding {
    fn fold(&mut self, word: u64) {
        let wide = u128::from(self.0 ^ word) * u128::from(0x9e37_79b9_7f4a_7c15_u64 ^ self.1.rotate_left(23));
        self.0 = (wide >> 64) as u64 ^ self.1;
        self.1 = (wide as u64).wrapping_add(word ^ 0xd1b5_4a32_d192_ed03);
    }
}

impl Hasher for Folding {
    fn finish(&self) -> u64 {
        let mut end = Self(self.0, self.1);
        end.fold(0x2545_f491_4f6c_dd1d);
        end.fold(0x9e6c_63d0_876a_68ee);
        end.0 ^ end.1
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.fold(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.fold(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.fold(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.fold(value as u64);
    }
}

/// The same for the same state in every run.
fn fingerprint<S: Hash>(state: &S) -> u64 {
    let mut hasher = Folding(0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344);
    state.hash(&mut hasher);
    hasher.finish()
}

/// How each state was reached first.
struct Found<M: Model> {
    index: HashMap<u64, u32, BuildHasherDefault<Same>>,
    parent: Vec<(u32, Option<M::Step>)>,
}

impl<M: Model> Found<M> {
    /// The state's number, and whether it is new.
    fn number(&mut self, state: &M::State, from: u32, by: Option<M::Step>) -> (u32, bool) {
        let next = u32::try_from(self.parent.len()).expect("fewer states than are allowed");
        let number = *self.index.entry(fingerprint(state)).or_insert(next);
        if number == next {
            self.parent.push((from, by));
        }
        (number, number == next)
    }

    fn violation(&self, model: &M, rule: &'static str, number: u32) -> Violation {
        let mut way = vec![];
        let mut at = number as usize;
        while let (before, Some(step)) = self.parent[at] {
            way.push((step, at));
            at = before as usize;
        }
        let mut state = model.begin();
        let mut trace = vec![];
        let mut next = vec![];
        for (step, number) in way.into_iter().rev() {
            trace.push(format!("{step:?}"));
            model.steps(&state, &mut next);
            let reached = |(_, after): &(M::Step, M::State)| self.index.get(&fingerprint(after)) == Some(&(number as u32));
            let Some(place) = next.iter().position(reached) else { break };
            state = next.swap_remove(place).1;
            next.clear();
        }
        Violation { rule, trace, state: format!("{state:#?}") }
    }
}

/// Explores all of `model`, at most `limit` states.
///
/// # Panics
/// If `limit` is larger than `u32::MAX - 1`.
pub fn explore<M: Model>(model: &M, limit: usize) -> Explored {
    assert!(limit < u32::MAX as usize, "states are numbered with 32 bits");
    let mut found: Found<M> = Found { index: HashMap::default(), parent: vec![] };
    let mut explored = Explored { states: 0, steps: 0, depth: 0, good_ends: 0, violation: None, cut_short: false };
    let first = model.begin();
    found.number(&first, 0, None);
    let mut frontier = VecDeque::from([(0_u32, 0_u32, first)]);
    // Edges of steps that are no faults, by where they begin; states are expanded in the order of their numbers.
    let (mut begins, mut leads): (Vec<u32>, Vec<u32>) = (vec![], vec![]);
    let mut good = vec![];
    let mut next = vec![];
    while let Some((number, depth, state)) = frontier.pop_front() {
        explored.depth = explored.depth.max(depth as usize);
        if let Some(rule) = model.broken(&state) {
            explored.violation = Some(found.violation(model, rule, number));
            break;
        }
        if model.is_good_end(&state) {
            good.push(number);
        }
        model.steps(&state, &mut next);
        for (step, after) in next.drain(..) {
            explored.steps += 1;
            if found.parent.len() >= limit {
                explored.cut_short = true;
                break;
            }
            let (reached, new) = found.number(&after, number, Some(step));
            if !model.is_fault(step) && reached != number {
                begins.push(number);
                leads.push(reached);
            }
            if new {
                frontier.push_back((reached, depth + 1, after));
            }
        }
        if explored.cut_short {
            break;
        }
    }
    explored.states = found.parent.len();
    explored.good_ends = good.len();
    if explored.violation.is_none() && !explored.cut_short {
        let lost = first_without_end(explored.states, &begins, &leads, good);
        explored.violation = lost.map(|number| found.violation(model, NO_GOOD_END, number));
    }
    explored
}

/// The first state from which no good end can be reached.
fn first_without_end(states: usize, begins: &[u32], leads: &[u32], good: Vec<u32>) -> Option<u32> {
    // The edges backwards, grouped by where they lead.
    let mut place = vec![0_u32; states + 1];
    for to in leads {
        place[*to as usize + 1] += 1;
    }
    for at in 1..place.len() {
        place[at] += place[at - 1];
    }
    let mut sources = vec![0_u32; leads.len()];
    let mut fill = place.clone();
    for (from, to) in begins.iter().zip(leads) {
        let slot = &mut fill[*to as usize];
        sources[*slot as usize] = *from;
        *slot += 1;
    }
    let mut reaches = vec![false; states];
    let mut waiting = good;
    for number in &waiting {
        reaches[*number as usize] = true;
    }
    while let Some(number) = waiting.pop() {
        let (from, to) = (place[number as usize] as usize, place[number as usize + 1] as usize);
        for source in &sources[from..to] {
            if !std::mem::replace(&mut reaches[*source as usize], true) {
                waiting.push(*source);
            }
        }
    }
    reaches.iter().position(|reaches| !reaches).map(|number| number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter that goes up to 5, and at 3 can fall into a hole.
    struct Counter {
        hole: bool,
        rule: Option<u8>,
    }

    impl Model for Counter {
        type State = u8;
        type Step = &'static str;

        fn begin(&self) -> u8 {
            0
        }

        fn steps(&self, state: &u8, next: &mut Vec<(&'static str, u8)>) {
            if *state < 5 {
                next.push(("up", state + 1));
            }
            if self.hole && *state == 3 {
                next.push(("fall", 100));
            }
            if *state == 100 {
                next.push(("luck", 5));
            }
        }

        fn is_fault(&self, step: &'static str) -> bool {
            step == "luck"
        }

        fn broken(&self, state: &u8) -> Option<&'static str> {
            (self.rule == Some(*state)).then_some("rule")
        }

        fn is_good_end(&self, state: &u8) -> bool {
            *state == 5
        }
    }

    #[test]
    fn every_state_is_visited_once() {
        let explored = explore(&Counter { hole: false, rule: None }, 100);
        assert_eq!((explored.states, explored.steps, explored.depth, explored.good_ends), (6, 5, 5, 1));
        assert!(explored.violation.is_none());
    }

    #[test]
    fn a_broken_rule_is_shown_with_the_shortest_way_to_it() {
        let violation = explore(&Counter { hole: true, rule: Some(100) }, 100).violation.expect("broken");
        assert_eq!((violation.rule, violation.trace.len(), violation.state.as_str()), ("rule", 4, "100"));
    }

    #[test]
    fn a_good_end_that_needs_a_fault_is_none() {
        let violation = explore(&Counter { hole: true, rule: None }, 100).violation.expect("stuck");
        assert_eq!((violation.rule, violation.state.as_str()), (NO_GOOD_END, "100"));
    }

    #[test]
    fn too_many_states_prove_nothing() {
        assert!(explore(&Counter { hole: false, rule: None }, 3).cut_short);
    }
}

//! What the relay decides: which frame is dropped, and when the others leave. Time is an argument, in microseconds.

use std::collections::VecDeque;

use crate::Loss;

/// Most bytes held: 100 ms of 10 Gbit/s and more than any sender's window here; beyond it frames are dropped.
const HELD_MAX: usize = 256 << 20;

/// Frames on their way, in order.
#[derive(Debug)]
pub(super) struct DelayQueue {
    delay_us: u64,
    loss: Loss,
    random: u64,
    held: usize,
    frames: VecDeque<(u64, Box<[u8]>)>,
}

impl DelayQueue {
    pub(super) fn new(delay_us: u64, loss: Loss, seed: u64) -> Self {
        Self { delay_us, loss, random: seed, held: 0, frames: VecDeque::new() }
    }

    /// Takes a frame that arrived at `now`, or loses it.
    pub(super) fn push(&mut self, now: u64, frame: &[u8]) {
        let lost = self.loss > Loss::NONE && self.next_random() % 1_000_000 < u64::from(self.loss.parts_per_million());
        if lost || self.held + frame.len() > HELD_MAX {
            return;
        }
        self.held += frame.len();
        self.frames.push_back((now.saturating_add(self.delay_us), frame.into()));
    }

    /// The next frame, if it is due.
    pub(super) fn pop(&mut self, now: u64) -> Option<Box<[u8]>> {
        let (_, frame) = self.frames.pop_front_if(|(due, _)| *due <= now)?;
        self.held -= frame.len();
        Some(frame)
    }

    /// When the next frame is due.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.frames.front().map(|(due, _)| *due)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): good enough to drop frames, and the same everywhere.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_and_not_before_their_time() {
        let mut queue = DelayQueue::new(40_000, Loss::NONE, 1);
        queue.push(0, b"a");
        queue.push(10, b"b");
        assert_eq!(queue.pop(39_999), None);
        assert_eq!(queue.next_due(), Some(40_000));
        assert_eq!(queue.pop(40_009).as_deref(), Some(&b"a"[..]));
        assert_eq!(queue.pop(40_009), None);
        assert_eq!(queue.pop(50_000).as_deref(), Some(&b"b"[..]));
        assert_eq!((queue.next_due(), queue.held), (None, 0));
    }

    #[test]
    fn loss_is_as_asked_and_the_same_for_the_same_seed() {
        let survivors = |seed| {
            let mut queue = DelayQueue::new(0, Loss::from_parts_per_million(100_000), seed);
            (0..100_000_u32).for_each(|n| queue.push(0, &n.to_be_bytes()));
            queue.frames.into_iter().map(|(_, frame)| frame).collect::<Vec<_>>()
        };
        let first = survivors(7);
        assert!((89_000..91_000).contains(&first.len()), "{}", first.len());
        assert_eq!(first, survivors(7));
        assert_ne!(first, survivors(8));
    }

    #[test]
    fn everything_or_nothing_can_be_lost() {
        for (parts, expected) in [(0, 1000), (1_000_000, 0)] {
            let mut queue = DelayQueue::new(0, Loss::from_parts_per_million(parts), 3);
            (0..1000).for_each(|_| queue.push(0, b"x"));
            assert_eq!(queue.frames.len(), expected);
        }
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut queue = DelayQueue::new(1, Loss::NONE, 0);
        let frame = vec![0; 1 << 20];
        (0..300).for_each(|_| queue.push(0, &frame));
        assert_eq!(queue.frames.len(), 256);
    }
}

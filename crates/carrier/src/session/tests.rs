//! Every frame arrives once and in order, however often the connection dies.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn frame(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

fn number(frame: &Bytes) -> u64 {
    u64::from_be_bytes(frame[..].try_into().expect("eight bytes"))
}

#[test]
fn what_a_connection_took_with_it_goes_again_and_nothing_else() {
    let now = Duration::ZERO;
    let mut source = Session::new(now);
    for number in 0..10 {
        source.push(frame(number), 100, now);
    }
    let first: Vec<u64> = std::iter::from_fn(|| source.next_to_send()).map(|frame| number(&frame)).collect();
    assert_eq!(first, (0..10).collect::<Vec<u64>>());
    assert!(source.on_ack(3, now));
    assert!(source.on_connected(5, now), "the peer has dealt with more than it could say");
    let again: Vec<u64> = std::iter::from_fn(|| source.next_to_send()).map(|frame| number(&frame)).collect();
    assert_eq!(again, (5..10).collect::<Vec<u64>>());
    assert!(source.on_ack(10, now) && source.is_settled());
    assert_eq!(source.window().in_flight(), 0);
}

#[test]
fn a_peer_that_has_dealt_with_what_it_never_got_or_forgets_is_caught() {
    let now = Duration::ZERO;
    let mut session = Session::new(now);
    for number in 0..4 {
        session.push(frame(number), 1, now);
    }
    assert!(!session.on_ack(1, now), "nothing was sent yet");
    session.next_to_send();
    session.next_to_send();
    assert!(!session.on_ack(3, now));
    assert!(session.on_ack(2, now));
    assert!(!session.on_ack(1, now));
    assert!(!session.on_connected(1, now) && !session.on_connected(u64::MAX, now));
    assert!(session.on_connected(2, now));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Push,
    Send,
    Deliver,
    Deal,
    Acknowledge,
    DeliverAck,
    Cut,
}

proptest! {
    #[test]
    fn prop_every_frame_arrives_once_and_in_order(steps in prop::collection::vec(prop_oneof![
        4 => Just(Step::Push), 4 => Just(Step::Send), 4 => Just(Step::Deliver), 4 => Just(Step::Deal), 2 => Just(Step::Acknowledge), 2 => Just(Step::DeliverAck),
        1 => Just(Step::Cut),
    ], 1..300)) {
        let now = Duration::ZERO;
        let (mut source, mut destination) = (Session::new(now), Session::new(now));
        let (mut forward, mut back) = (VecDeque::new(), VecDeque::new());
        let mut pushed = 0;
        let mut arrived = Vec::new();
        let mut queue = VecDeque::new();
        let take = |frame: Bytes, destination: &mut Session, queue: &mut VecDeque<Bytes>| {
            destination.on_taken();
            queue.push_back(frame);
        };
        let mut deal = |destination: &mut Session, queue: &mut VecDeque<Bytes>| {
            if let Some(frame) = queue.pop_front() {
                arrived.push(number(&frame));
                destination.on_dealt();
            }
        };
        for step in steps {
            match step {
                Step::Push => {
                    source.push(frame(pushed), 1, now);
                    pushed += 1;
                }
                Step::Send => forward.extend(source.next_to_send()),
                Step::Deliver => if let Some(frame) = forward.pop_front() {
                    take(frame, &mut destination, &mut queue);
                },
                Step::Deal => deal(&mut destination, &mut queue),
                Step::Acknowledge => back.extend(destination.ack_due()),
                Step::DeliverAck => if let Some(total) = back.pop_front() {
                    prop_assert!(source.on_ack(total, now));
                },
                Step::Cut => {
                    forward.clear();
                    back.clear();
                    prop_assert!(source.on_connected(destination.taken(), now));
                    prop_assert!(destination.on_connected(source.taken(), now));
                }
            }
            prop_assert_eq!(source.window().in_flight(), 8 * source.kept.len() as u64);
        }
        while let Some(frame) = source.next_to_send() {
            forward.push_back(frame);
        }
        while let Some(frame) = forward.pop_front() {
            take(frame, &mut destination, &mut queue);
        }
        while !queue.is_empty() {
            deal(&mut destination, &mut queue);
        }
        let last = destination.ack_due().unwrap_or_else(|| destination.taken());
        prop_assert!(source.on_ack(last, now) && source.is_settled());
        prop_assert_eq!(arrived, (0..pushed).collect::<Vec<u64>>());
    }
}

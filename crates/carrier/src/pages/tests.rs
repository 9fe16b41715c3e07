//! What the source sends makes the destination's memory the source's, byte for byte, and cheaply; what lies is found out.

use std::convert::Infallible;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::Level;

const KEY: [u8; 32] = [7; 32];

/// Blocks of pages; and whether the image beside them is another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Memory(Vec<Vec<Page>>, bool);

impl Memory {
    fn new(blocks: &[u32]) -> Self {
        Self(blocks.iter().map(|pages| vec![[0; PAGE_SIZE]; *pages as usize]).collect(), false)
    }
}

impl GuestMemory for Memory {
    type Error = Infallible;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> Result<(), Infallible> {
        *into = match block.checked_sub(FIRST_IMAGE) {
            _ if block == COMMON => noise(SHARED[page as usize]),
            Some(_) => noise(IMAGE[page as usize] + u64::from(self.1)),
            None => self.0[usize::from(block)][page as usize],
        };
        Ok(())
    }

    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> Result<(), Infallible> {
        let (pages, rest) = content.as_chunks::<PAGE_SIZE>();
        assert!(rest.is_empty() && !pages.is_empty());
        for (target, source) in self.0[usize::from(block)][page as usize..].iter_mut().zip(pages) {
            *target = *source;
        }
        Ok(())
    }
}

/// Both halves, and the memory at each side.
struct Pair {
    encoder: Encoder,
    sealer: Sealer,
    level: Level,
    applier: Applier,
    source: Memory,
    destination: Memory,
    wire: usize,
}

impl Pair {
    fn new(blocks: &[u32], limits: EncoderLimits) -> Self {
        let digester = Digester::new(&KEY);
        Self {
            encoder: Encoder::new(digester.clone(), blocks, limits),
            sealer: Sealer::new(),
            level: Level::default(),
            applier: Applier::new(digester, blocks.to_vec()),
            source: Memory::new(blocks),
            destination: Memory::new(blocks),
            wire: 0,
        }
    }

    fn write(&mut self, block: u16, page: u32, content: Page) {
        self.source.0[usize::from(block)][page as usize] = content;
        if self.encoder.is_full() {
            self.flush();
        }
        let content = (!digest::is_zero(&content)).then_some(&content);
        assert!(self.encoder.encode(Place { block, page }, content));
    }

    fn sealed(&mut self) -> Option<Bytes> {
        let batch = self.encoder.take()?;
        let payload = self.sealer.seal(&batch, self.level);
        assert!(payload.len() <= MAX_PAYLOAD);
        self.encoder.on_sealed(&batch, payload.len());
        Some(payload)
    }

    fn flush(&mut self) {
        if let Some(payload) = self.sealed() {
            self.wire += payload.len();
            self.applier.apply(&payload, &mut self.destination).expect("what the encoder says");
        }
    }

    /// The destination holds this from an earlier stay, and has told so.
    fn tell(&mut self, block: u16, page: u32, content: Page) {
        self.source.0[usize::from(block)][page as usize] = content;
        self.destination.0[usize::from(block)][page as usize] = content;
        assert!(self.encoder.on_held(Place { block, page }, Digester::new(&KEY).page(&content)));
    }

    /// The destination answers what it is asked.
    fn answer(&mut self) {
        self.flush();
        while let Some(place) = self.encoder.ask() {
            let pieces = Digester::new(&KEY).told_pieces(&self.destination.0[usize::from(place.block)][place.page as usize]);
            if self.encoder.is_full() {
                self.flush();
            }
            self.encoder.on_pieces(place, &pieces);
        }
    }

    /// Bytes on the wire since the last call.
    fn cost(&mut self) -> usize {
        self.answer();
        self.flush();
        assert!(self.source == self.destination, "the memories differ");
        std::mem::take(&mut self.wire)
    }
}

fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut page);
    page
}

fn changed(page: &Page, at: usize) -> Page {
    let mut page = *page;
    page[at] ^= 0xff;
    page
}

/// An image of two pages that both sides have.
struct OneImage;

const IMAGE: [u64; 2] = [900, 901];

impl Images for OneImage {
    fn find(&mut self, content: &Page) -> Option<Place> {
        let page = (0..).zip(IMAGE).find(|(_, seed)| noise(*seed) == *content)?.0;
        Some(Place { block: FIRST_IMAGE, page })
    }
}

#[test]
fn what_an_image_holds_is_named_and_what_has_changed_since_is_patched() {
    let mut pair = Pair::new(&[20], EncoderLimits::default());
    pair.encoder.set_images(Box::new(OneImage));
    pair.encoder.set_asks(true);
    pair.applier = Applier::new(Digester::new(&KEY), vec![20]).with_images(vec![2]);
    for page in 0..10 {
        pair.write(0, page, noise(IMAGE[page as usize % 2]));
    }
    pair.write(0, 10, noise(1));
    assert!((PAGE_SIZE..PAGE_SIZE + 300).contains(&pair.cost()));
    // The image is read once for each content, later pages are copies of the first.
    assert_eq!(pair.encoder.encoding(), Encoding { image: 2, copy: 8, data: 1, ..Encoding::default() });
    pair.write(0, 0, changed(&noise(IMAGE[0]), 70));
    assert!(pair.cost() < 150);
    pair.write(0, 0, noise(IMAGE[1]));
    assert!(pair.cost() < 60);
    assert_eq!(pair.encoder.encoding(), Encoding { image: 2, copy: 9, patch: 1, data: 1, ..Encoding::default() });
    // Nothing waits for a disk any more.
    pair.write(0, 0, noise(5));
    pair.write(0, 1, noise(5));
    let _ = pair.cost();
    for page in (3..10).step_by(2).chain([2, 4, 6, 8, 0]) {
        pair.write(0, page, [0; PAGE_SIZE]);
    }
    pair.encoder.set_asks(false);
    pair.write(0, 11, noise(IMAGE[1]));
    assert!(pair.cost() > PAGE_SIZE);
    assert_eq!(pair.encoder.encoding().image, 2);
}

#[test]
fn an_image_that_is_another_or_too_short_is_found_out() {
    for (pages, wrong) in [(1, false), (2, true), (0, false)] {
        let mut pair = Pair::new(&[20], EncoderLimits::default());
        pair.encoder.set_images(Box::new(OneImage));
        pair.encoder.set_asks(true);
        pair.applier = Applier::new(Digester::new(&KEY), vec![20]).with_images(vec![pages]);
        pair.write(0, 3, noise(IMAGE[1]));
        pair.destination.1 = wrong;
        let payload = pair.sealed().expect("a page");
        let refused = pair.applier.apply(&payload, &mut pair.destination);
        if wrong {
            assert!(matches!(refused, Err(ApplyError::Image { image: 0 })), "{refused:?}");
        } else {
            assert!(matches!(refused, Err(ApplyError::Page { .. })), "{refused:?}");
        }
        assert_eq!(pair.destination.0[0][3], [0; PAGE_SIZE]);
    }
}

/// Pages of other VMs that the destination holds.
const SHARED: [u64; 3] = [700, 701, 700];

#[test]
fn what_another_vm_has_too_is_named() {
    let mut pair = Pair::new(&[20], EncoderLimits::default());
    let digester = Digester::new(&KEY);
    pair.encoder.set_common(SHARED.map(|seed| digester.page(&noise(seed))).into_iter().chain([digest::ZERO]));
    pair.applier.set_common(3);
    for page in 0..4 {
        pair.write(0, page, noise(SHARED[page as usize % 2]));
    }
    pair.write(0, 4, noise(1));
    assert!((PAGE_SIZE..PAGE_SIZE + 100).contains(&pair.cost()));
    assert_eq!(pair.encoder.encoding(), Encoding { common: 2, copy: 2, data: 1, ..Encoding::default() });
    // Also while the VM stands still, and in the place of a page that the destination has told; zeros are zeros.
    pair.tell(0, 10, noise(2));
    pair.encoder.set_asks(true);
    pair.write(0, 4, noise(700));
    pair.write(0, 0, noise(3));
    pair.write(0, 2, [0; PAGE_SIZE]);
    let _ = pair.cost();
    pair.write(0, 10, noise(701));
    pair.write(0, 4, [0; PAGE_SIZE]);
    pair.write(0, 11, noise(700));
    assert!(pair.cost() < 60);
    let encoding = pair.encoder.encoding();
    assert_eq!((encoding.common, encoding.data), (3, 2), "{encoding:?}");
}

#[test]
fn a_page_of_another_vm_that_was_not_told_is_none() {
    let mut pair = Pair::new(&[20], EncoderLimits::default());
    pair.encoder.set_common([Digester::new(&KEY).page(&noise(SHARED[0]))]);
    pair.write(0, 3, noise(SHARED[0]));
    let payload = pair.sealed().expect("a page");
    let refused = pair.applier.apply(&payload, &mut pair.destination);
    assert!(matches!(refused, Err(ApplyError::Page { block: COMMON })), "{refused:?}");
    // It holds something else there.
    pair.encoder.set_common([[0; 16], Digester::new(&KEY).page(&noise(5))]);
    pair.applier.set_common(2);
    pair.write(0, 4, noise(5));
    let payload = pair.sealed().expect("a page");
    let refused = pair.applier.apply(&payload, &mut pair.destination);
    assert!(matches!(refused, Err(ApplyError::Check { block: 0, page: 4 })), "{refused:?}");
}

#[test]
fn who_knows_of_a_page_of_another_vm_only_what_was_told_does_not_get_it() {
    let digester = Digester::new(&KEY);
    let told = digester.page(&noise(SHARED[0]));
    for (check, gets) in [(*told.first_chunk().expect("long"), false), (digester.proof(&noise(SHARED[0])), true)] {
        let mut pair = Pair::new(&[20], EncoderLimits::default());
        pair.applier.set_common(1);
        let mut writer = batch::Writer::default();
        writer.put(0, 3, &batch::Entry::Copy { block: COMMON, page: 0, check });
        let payload = pair.sealer.seal(&Batch::after(writer.finish(), 0), pair.level);
        let applied = pair.applier.apply(&payload, &mut pair.destination);
        assert_eq!((applied.is_ok(), pair.destination.0[0][3] == noise(SHARED[0])), (gets, gets));
    }
}

#[test]
fn each_page_goes_the_cheapest_way() {
    let mut pair = Pair::new(&[200, 10], EncoderLimits::default());
    for page in 0..100 {
        pair.write(0, page, noise(u64::from(page)));
    }
    let noise_cost = pair.cost();
    assert!((100 * PAGE_SIZE..100 * PAGE_SIZE + 500).contains(&noise_cost), "{noise_cost} for noise");
    for page in 0..100 {
        pair.write(0, page, noise(u64::from(page)));
    }
    assert_eq!(pair.cost(), 0, "the same again");
    for page in 0..100 {
        pair.write(0, 100 + page, noise(5));
    }
    assert!(pair.cost() < 100 * 16, "copies");
    for page in 0..100 {
        pair.write(0, page, changed(&noise(u64::from(page)), 77));
    }
    let patches = pair.cost();
    assert!(patches < 100 * 90, "{patches} for a byte changed in each");
    for page in 0..10 {
        pair.write(1, page, [b'a' + page as u8; PAGE_SIZE]);
    }
    assert!(pair.cost() < 200, "ten pages of one letter each compress");
    for page in 0..100 {
        pair.write(0, page, [0; PAGE_SIZE]);
    }
    assert!(pair.cost() < 120, "zeros");
    let expected = Encoding { same: 100, zero: 100, copy: 100, patch: 100, data: 110, ..Encoding::default() };
    assert_eq!(pair.encoder.encoding(), expected);
}

#[test]
fn what_pages_cost_that_are_sent_again_is_known() {
    let mut pair = Pair::new(&[4096], EncoderLimits::default());
    for page in 0..4096 {
        pair.write(0, page, noise(u64::from(page)));
    }
    pair.flush();
    assert_eq!(pair.encoder.cost_again(), None, "nothing was sent again");
    for page in 0..2048 {
        pair.write(0, page, changed(&noise(u64::from(page)), 3));
    }
    pair.flush();
    let cost = pair.encoder.cost_again().expect("known");
    assert!((64..100).contains(&cost), "{cost}");
}

#[test]
fn an_encoder_takes_no_more_memory_than_it_may() {
    let limits = EncoderLimits { signatures: 10 * 520, contents: 7 * 40 };
    let mut pair = Pair::new(&[100], limits);
    for seed in 0..5 {
        for page in 0..100 {
            pair.write(0, page, noise(seed * 1000 + u64::from(page)));
            let used = pair.encoder.used();
            assert!(used.signatures <= limits.signatures && used.contents <= limits.contents, "{used:?}");
        }
        pair.cost();
    }
    assert_eq!(pair.encoder.used(), limits);
}

#[test]
fn what_the_destination_holds_already_is_not_sent_if_it_says_so() {
    let mut pair = Pair::new(&[10], EncoderLimits::default());
    pair.destination.0[0][3] = noise(3);
    pair.destination.0[0][4] = noise(4);
    for page in [3, 4] {
        assert!(pair.encoder.on_held(Place { block: 0, page }, Digester::new(&KEY).page(&noise(u64::from(page)))));
    }
    assert!(
        !pair.encoder.on_held(Place { block: 0, page: 10 }, [1; 16]) && !pair.encoder.on_held(Place { block: 1, page: 0 }, [1; 16])
    );
    pair.write(0, 3, noise(3));
    pair.write(0, 5, noise(4));
    pair.write(0, 4, [0; PAGE_SIZE]);
    assert!(pair.cost() < 40);
    assert_eq!(pair.encoder.encoding(), Encoding { same: 1, copy: 1, zero: 1, ..Encoding::default() });
}

#[test]
fn of_a_version_that_was_only_told_the_pieces_are_asked_for() {
    let mut pair = Pair::new(&[400], EncoderLimits::default());
    (0..300).for_each(|page| pair.tell(0, page, noise(u64::from(page))));
    pair.write(0, 0, changed(&noise(0), 5));
    assert!((PAGE_SIZE..PAGE_SIZE + 100).contains(&pair.cost()), "nobody waits unasked");
    pair.encoder.set_asks(true);
    (1..300).for_each(|page| pair.write(0, page, changed(&noise(u64::from(page)), 5)));
    assert_eq!((pair.encoder.take(), pair.encoder.waiting(), pair.encoder.unasked()), (None, 299, 299));
    let cost = pair.cost();
    assert!(cost < 299 * (PIECE + 20), "{cost}");
    assert_eq!((pair.encoder.waiting(), pair.encoder.encoding().patch), (0, 299));
    // It is known from now on.
    pair.write(0, 7, changed(&noise(7), 9));
    assert_eq!(pair.encoder.waiting(), 0);
    assert!(pair.cost() < 2 * PIECE);
}

#[test]
fn what_waits_is_sent_as_it_was_last() {
    let mut pair = Pair::new(&[10], EncoderLimits::default());
    (0..10).for_each(|page| pair.tell(0, page, noise(u64::from(page))));
    pair.encoder.set_asks(true);
    (0..10).for_each(|page| pair.write(0, page, changed(&noise(u64::from(page)), 5)));
    pair.write(0, 0, changed(&noise(0), 900));
    pair.write(0, 1, [0; PAGE_SIZE]);
    pair.write(0, 2, noise(2));
    let late: Vec<Place> = std::iter::from_fn(|| pair.encoder.ask()).collect();
    pair.write(0, 3, noise(77));
    pair.write(0, 4, [0; PAGE_SIZE]);
    assert_eq!((late.len(), pair.encoder.waiting()), (8, 7));
    for place in late {
        let pieces = Digester::new(&KEY).told_pieces(&pair.destination.0[0][place.page as usize]);
        pair.encoder.on_pieces(place, &pieces);
    }
    pair.cost();
    // Without an answer, whole.
    pair.tell(0, 9, noise(9));
    pair.write(0, 9, noise(90));
    let place = Place { block: 0, page: 9 };
    assert!(pair.encoder.is_waiting(place));
    assert_eq!((pair.encoder.wait_no_longer(), pair.encoder.wait_no_longer()), (Some(place), None));
    assert!(!pair.encoder.is_waiting(place));
    assert!(pair.cost() >= PAGE_SIZE);
}

#[test]
fn a_destination_that_tells_wrong_pieces_finds_out_itself() {
    let mut pair = Pair::new(&[10], EncoderLimits::default());
    pair.tell(0, 1, noise(1));
    pair.encoder.set_asks(true);
    let content = changed(&changed(&noise(1), 5), 900);
    pair.write(0, 1, content);
    let place = pair.encoder.ask().expect("a question");
    pair.encoder.on_pieces(place, &Digester::new(&KEY).told_pieces(&changed(&content, 5)));
    let payload = pair.sealed().expect("a batch");
    let refused = pair.applier.apply(&payload, &mut pair.destination);
    assert!(matches!(refused, Err(ApplyError::Check { .. })), "{refused:?}");
}

#[test]
fn what_is_held_in_a_block_that_others_write_to_is_no_source_of_copies() {
    let mut pair = Pair::new(&[10, 10], EncoderLimits::default());
    pair.encoder = Encoder::new(Digester::new(&KEY), &[0, 10], EncoderLimits::default());
    assert!(!pair.encoder.on_held(Place { block: 0, page: 3 }, Digester::new(&KEY).page(&noise(3))));
    pair.write(1, 5, noise(3));
    assert!(pair.cost() > PAGE_SIZE);
    assert_eq!(pair.encoder.encoding(), Encoding { data: 1, ..Encoding::default() });
}

#[test]
fn a_destination_that_does_not_hold_what_it_said_finds_out_itself() {
    for (before, after) in [(noise(1), noise(1)), (noise(1), changed(&noise(1), 9))] {
        let mut pair = Pair::new(&[10], EncoderLimits::default());
        pair.write(0, 0, before);
        pair.cost();
        pair.destination.0[0][0] = noise(2);
        let target = u32::from(before == after);
        assert!(pair.encoder.encode(Place { block: 0, page: target }, Some(&after)));
        let payload = pair.sealed().expect("a batch");
        let refused = pair.applier.apply(&payload, &mut pair.destination);
        assert!(matches!(refused, Err(ApplyError::Check { block: 0, page }) if page == target), "{refused:?}");
    }
}

#[test]
fn a_page_beyond_a_block_is_refused_on_both_sides() {
    let mut wide = Pair::new(&[10, 10], EncoderLimits::default());
    for (block, page) in [(0, 10), (2, 0), (u16::MAX, u32::MAX)] {
        assert!(!wide.encoder.encode(Place { block, page }, None));
    }
    assert!(wide.encoder.encode(Place { block: 1, page: 9 }, Some(&noise(1))));
    let payload = wide.sealed().expect("a batch");
    for blocks in [vec![10], vec![10, 9]] {
        let mut memory = Memory::new(&blocks);
        let refused = Applier::new(Digester::new(&KEY), blocks).apply(&payload, &mut memory);
        assert!(matches!(refused, Err(ApplyError::Page { block: 1 })), "{refused:?}");
    }
}

#[test]
fn every_level_is_exact_and_a_higher_one_no_larger_on_the_whole() {
    let mut sizes = vec![];
    for level in Level::all() {
        let mut pair = Pair::new(&[64], EncoderLimits::default());
        pair.level = level;
        for page in 0..64_u32 {
            let mut content = noise(u64::from(page));
            content[..3000].fill(b'a' + (page % 20) as u8);
            pair.write(0, page, content);
        }
        sizes.push(pair.cost());
        assert_eq!(pair.source, pair.destination, "{level:?}");
    }
    assert!(sizes[0] > 64 * PAGE_SIZE && sizes.is_sorted_by(|before, after| after < &(before + before / 50)), "{sizes:?}");
}

#[test]
fn a_batch_cut_at_any_length_or_longer_is_refused() {
    for compressible in [false, true] {
        let mut pair = Pair::new(&[10], EncoderLimits::default());
        let content = |page: u64| if compressible { [b'a' + page as u8; PAGE_SIZE] } else { noise(page) };
        for page in 0..3 {
            pair.write(0, page as u32, content(page));
        }
        pair.write(0, 3, content(1));
        pair.write(0, 0, changed(&content(0), 1));
        let payload = pair.sealed().expect("a batch");
        pair.applier.apply(&payload, &mut pair.destination).expect("whole");
        for cut in 0..payload.len() {
            let refused = pair.applier.apply(&payload[..cut], &mut pair.destination);
            assert!(matches!(refused, Err(ApplyError::Malformed(_))), "cut at {cut}: {refused:?}");
        }
        let longer = [&payload[..], &[0]].concat();
        assert!(matches!(pair.applier.apply(&longer, &mut pair.destination), Err(ApplyError::Malformed(_))));
    }
}

#[test]
fn a_batch_that_claims_to_be_huge_is_refused_before_anything_is_allocated() {
    let mut applier = Applier::new(Digester::new(&KEY), vec![10]);
    for how in 0..=2 {
        let refused = applier.apply(&[how, 0xff, 0xff, 0xff, 0xff, 1], &mut Memory::new(&[10]));
        assert!(matches!(refused, Err(ApplyError::Malformed(MalformedBatch::Length))), "{refused:?}");
    }
    // Entries that write more than a batch may: a few bytes each.
    let entries: Vec<u8> = [0, 0, 0].into_iter().chain(std::iter::repeat_n([0x81, 0], batch::MAX_ENTRIES).flatten()).collect();
    let body = [&u32::try_from(entries.len()).expect("small").to_be_bytes()[..], &entries].concat();
    let payload = [&[0][..], &u32::try_from(body.len()).expect("small").to_be_bytes(), &body].concat();
    let refused = applier.apply(&payload, &mut Memory::new(&[10]));
    assert!(matches!(refused, Err(ApplyError::Malformed(MalformedBatch::Entries))), "{refused:?}");
}

#[derive(Clone, Copy, Debug)]
enum Write {
    Zero,
    Noise(u64),
    Letter(u8),
    Change(usize),
    CopyOf(u32),
}

fn any_write() -> impl Strategy<Value = Write> {
    prop_oneof![
        Just(Write::Zero),
        (0..20_u64).prop_map(Write::Noise),
        (0..4_u8).prop_map(Write::Letter),
        (0..PAGE_SIZE).prop_map(Write::Change),
        (0..40_u32).prop_map(Write::CopyOf),
    ]
}

proptest! {
    #[test]
    fn prop_the_destination_becomes_what_the_source_is(
        writes in prop::collection::vec((0..2_u16, 0..40_u32, any_write(), prop::bool::weighted(0.1)), 1..400),
        signatures in 0..40_u64,
        contents in 0..40_u64,
        kept in prop::collection::vec(0..4_u8, 80),
    ) {
        let limits = EncoderLimits { signatures: signatures * 520, contents: contents * 40 };
        let mut pair = Pair::new(&[40, 40], limits);
        // What an earlier stay has left there: nothing, the same, an older version, something else.
        pair.encoder.set_asks(signatures % 2 == 0);
        for ((block, page), kept) in (0..2).flat_map(|block| (0..40).map(move |page| (block, page))).zip(kept) {
            let seed = 1_000 + u64::from(page);
            if kept > 0 {
                pair.tell(block, page, noise(seed));
            }
            match kept {
                0 | 3 => pair.write(block, page, noise(seed + 100)),
                1 => pair.write(block, page, noise(seed)),
                _ => pair.write(block, page, changed(&noise(seed), page as usize)),
            }
        }
        for (block, page, write, flush) in writes {
            let now = pair.source.0[usize::from(block)][page as usize];
            let content = match write {
                Write::Zero => [0; PAGE_SIZE],
                Write::Noise(seed) => noise(seed),
                Write::Letter(letter) => [b'a' + letter; PAGE_SIZE],
                Write::Change(at) => changed(&now, at),
                Write::CopyOf(other) => pair.source.0[0][other as usize],
            };
            pair.write(block, page, content);
            if flush {
                pair.cost();
            }
        }
        pair.cost();
    }

    #[test]
    fn prop_no_bytes_make_the_destination_panic(payload in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut memory = Memory::new(&[3, 3]);
        let mut applier = Applier::new(Digester::new(&KEY), vec![3, 3]);
        let _ = applier.apply(&payload, &mut memory);
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        let framed = [&[0][..], &length, &payload].concat();
        let _ = applier.apply(&framed, &mut memory);
    }
}

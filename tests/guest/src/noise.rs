//! Random numbers that are the same for the same seed: page content, the order of writes, the stream. Not for secrets.

/// xorshift64*: each step needs the one before. Generators without that are turned into vector instructions by the
/// compiler, and those take 25 times as long in an emulated CPU.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// The sequence that belongs to `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) | 1)
    }

    /// The next number of the sequence.
    pub const fn next_word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below `bound`; zero for a bound of zero.
    pub const fn below(&mut self, bound: u64) -> u64 {
        ((self.next_word() as u128 * bound as u128) >> 64) as u64
    }
}

/// Spreads every bit of `word` over all bits of the result.
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_noise() {
        let (mut one, mut two, mut other) = (Noise::new(1), Noise::new(1), Noise::new(2));
        let (a, b, c) = (one.next_word(), two.next_word(), other.next_word());
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_ne!(one.next_word(), a);
    }

    #[test]
    fn below_stays_below() {
        let mut noise = Noise::new(7);
        assert!((0..10_000).all(|_| noise.below(13) < 13));
        assert_eq!(noise.below(0), 0);
    }
}

//! What members and reducers compute: within its error, the same in any order and on every vector unit, and refused where
//! it has to be.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;
use sundara_proto::id::{Digest, RoundId};
use sundara_proto::rules::round::Level;
use sundara_proto::rules::round::dtype::{
    Compress, Dtype, Wire, Word, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16,
};
use sundara_proto::rules::round::exact::{self, ExactOp};
use sundara_proto::rules::round::fixed::{self, Refusal, RefusalKind};
use sundara_proto::rules::round::layout::{BLOCK, GROUP, blocks};
use sundara_proto::rules::round::tags::{self, P, TagKey};

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f32_to_f16(*v).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|v| f32_to_bf16(*v).to_le_bytes()).collect(),
        _ => unreachable!("floats of 32 bits and less"),
    }
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16_to_f32(u16::from_le_bytes(*b))).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| bf16_to_f32(u16::from_le_bytes(*b))).collect(),
    }
}

/// What a verified round makes of tensors that all take part, summed in `order`.
fn round(wire: Wire, dtype: Dtype, tensors: &[Vec<u8>], order: &[usize], divisor: u32) -> Vec<u8> {
    let elements = tensors[0].len() / dtype.len();
    let mut shared = vec![0; blocks(elements)];
    for tensor in tensors {
        fixed::max_exponents(&mut shared, &fixed::block_exponents(wire, dtype, tensor, None).unwrap());
    }
    let mut sum = vec![0; elements * wire.output().len()];
    for place in order {
        let mut words = vec![0; elements * wire.input().len()];
        fixed::quantise(wire, dtype, &tensors[*place], &shared, &mut words, None);
        assert!(fixed::check_range(wire.input(), &words, wire.q().into()));
        fixed::sum_into(wire, &mut sum, &words);
    }
    fixed::finish(wire, &sum, tensors.len()).unwrap();
    let mut out = vec![0; tensors[0].len()];
    fixed::dequantise(wire, dtype, &sum, &shared, divisor, &mut out).unwrap();
    out
}

/// |sum - true sum| over the sum of the members' norms.
fn error(tensors: &[Vec<f32>], result: &[f32], divisor: f64) -> f64 {
    let norm = |v: &Vec<f32>| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let wrong = (0..result.len()).map(|k| {
        let exact: f64 = tensors.iter().map(|t| f64::from(t[k])).sum();
        (exact - f64::from(result[k]) * divisor).powi(2)
    });
    wrong.sum::<f64>().sqrt() / tensors.iter().map(norm).sum::<f64>().max(f64::MIN_POSITIVE)
}

/// Gradients of several kinds, for `members`, of one length.
fn gradients(members: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<Vec<f32>>> {
    (members, 1_usize..900, 0_u8..5, -60_i32..60, any::<u64>()).prop_map(|(members, len, kind, exponent, seed)| {
        let mut state = seed | 1;
        let mut uniform = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let scale = 2_f32.powi(exponent);
        let mut normal = move || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let mut tensors: Vec<Vec<f32>> = Vec::new();
        for member in 0..members {
            let tensor = (0..len).map(|k| {
                let x = normal();
                scale
                    * match kind {
                        0 => x,
                        // Heavy tails.
                        1 => x / (normal().abs() + 1e-3),
                        // Every second member is the one before, negated, nearly.
                        2 if member % 2 == 1 => -tensors[member - 1][k] / scale + x * 1e-5,
                        // Mostly zero.
                        3 if x.abs() < 2.0 => 0.0,
                        // Blocks of very different size.
                        4 => x * 2_f32.powi((k / BLOCK) as i32 * 9 - 18),
                        _ => x,
                    }
            });
            tensors.push(tensor.collect());
        }
        tensors
    })
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn sums_of_f32_are_within_their_error(tensors in gradients(1..=20), mean in any::<bool>()) {
        let wire = Wire::of(Dtype::F32, Compress::None, tensors.len()).unwrap();
        let divisor = if mean { tensors.len() as u32 } else { 1 };
        let raw: Vec<Vec<u8>> = tensors.iter().map(|t| bytes(Dtype::F32, t)).collect();
        let order: Vec<usize> = (0..tensors.len()).collect();
        let result = round(wire, Dtype::F32, &raw, &order, divisor);
        let error = error(&tensors, &floats(Dtype::F32, &result), divisor.into());
        prop_assert!(error <= 6e-7, "{error}");
    }

    #[test]
    fn sums_are_free_of_order(tensors in gradients(2..=9), order in any::<prop::sample::Index>(), which in 0_usize..5) {
        let (dtype, compress) = [
            (Dtype::F32, Compress::None), (Dtype::F32, Compress::Bf16), (Dtype::F32, Compress::Int8),
            (Dtype::F16, Compress::None), (Dtype::Bf16, Compress::None),
        ][which];
        let wire = Wire::of(dtype, compress, tensors.len()).unwrap();
        let raw: Vec<Vec<u8>> = tensors.iter().map(|t| {
            let small: Vec<f32> = t.iter().map(|x| if dtype == Dtype::F16 { x.clamp(-6e4, 6e4) } else { *x }).collect();
            bytes(dtype, &small)
        }).collect();
        let forwards: Vec<usize> = (0..tensors.len()).collect();
        let mut others = forwards.clone();
        others.rotate_left(order.index(tensors.len()));
        others.swap(0, tensors.len() - 1);
        prop_assert!(round(wire, dtype, &raw, &forwards, 1) == round(wire, dtype, &raw, &others, 1));
    }

    #[test]
    fn error_feedback_loses_nothing(tensors in gradients(1..=1), compress in prop_oneof![Just(Compress::Bf16), Just(Compress::Int8)]) {
        let wire = Wire::of(Dtype::F32, compress, 4).unwrap();
        let tensor = bytes(Dtype::F32, &tensors[0]);
        let mut residual = vec![0.0; tensors[0].len()];
        for _ in 0..3 {
            let shared = fixed::block_exponents(wire, Dtype::F32, &tensor, Some(&residual)).unwrap();
            let before: Vec<f32> = tensors[0].iter().zip(&residual).map(|(x, r)| x + r).collect();
            let mut words = vec![0; tensors[0].len() * wire.input().len()];
            fixed::quantise(wire, Dtype::F32, &tensor, &shared, &mut words, Some(&mut residual));
            prop_assert!(fixed::check_range(wire.input(), &words, wire.q().into()));
            let mut sum = vec![0; tensors[0].len() * wire.output().len()];
            fixed::sum_into(wire, &mut sum, &words);
            let mut back = vec![0; tensor.len()];
            fixed::dequantise(wire, Dtype::F32, &sum, &shared, 1, &mut back).unwrap();
            for ((x, q), r) in before.iter().zip(floats(Dtype::F32, &back)).zip(&residual) {
                prop_assert_eq!(*x, q + r);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_refused_by_its_place(
        len in 1_usize..700, place in any::<prop::sample::Index>(), which in 0_usize..3, kind in 0_usize..3,
        feedback in any::<bool>(),
    ) {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][which];
        let place = place.index(len);
        let mut values = vec![1.5; len];
        values[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
        let wire = Wire::of(dtype, Compress::None, 3).unwrap();
        let kind = if kind == 0 { RefusalKind::Nan } else { RefusalKind::Infinite };
        let residual = feedback.then(|| vec![0.5; len]);
        let refused = fixed::block_exponents(wire, dtype, &bytes(dtype, &values), residual.as_deref());
        prop_assert_eq!(refused, Err(Refusal { index: place, kind }));
    }

    #[test]
    fn integers_are_their_own_words(
        values in vec(-(1_i32 << 28)..=1 << 28, 1..600), place in any::<prop::sample::Index>(), beyond in any::<bool>(),
    ) {
        let wire = Wire::of(Dtype::I32, Compress::None, 4).unwrap();
        let mut values = values;
        let place = place.index(values.len());
        if beyond {
            values[place] = (1 << 28) + 1;
        }
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let exponents = fixed::block_exponents(wire, Dtype::I32, &raw, None);
        if beyond {
            prop_assert_eq!(exponents, Err(Refusal { index: place, kind: RefusalKind::Overflow }));
        } else {
            let tensors = [raw.clone(), raw.clone(), raw];
            let out = round(wire, Dtype::I32, &tensors, &[0, 1, 2], 1);
            let wanted: Vec<u8> = values.iter().flat_map(|v| (3 * v).to_le_bytes()).collect();
            prop_assert!(out == wanted);
        }
    }

    #[test]
    fn the_least_exponent_that_fits_is_taken(bits in 1_u32..0x7f80_0000, members in 1_usize..=256, which in 0_usize..3) {
        let compress = [Compress::None, Compress::Bf16, Compress::Int8][which];
        let wire = Wire::of(Dtype::F32, compress, members).unwrap();
        let value = f32::from_bits(bits);
        let raw = bytes(Dtype::F32, &[value]);
        let exponent = fixed::block_exponents(wire, Dtype::F32, &raw, None).unwrap()[0];
        let word = |exponent: u8| {
            let scaled = f64::from(value) / 2_f64.powi(wire.first_exponent() + i32::from(exponent) - 1);
            scaled.round_ties_even()
        };
        prop_assert!(exponent >= 1 && word(exponent) <= wire.q().into());
        prop_assert!(exponent == 1 || word(exponent - 1) > wire.q().into());
        let mut words = vec![0; wire.input().len()];
        for shared in [exponent, exponent.saturating_add(3), 255] {
            fixed::quantise(wire, Dtype::F32, &raw, &[shared], &mut words, None);
            let mut wide = [0; 8];
            wide[..words.len()].copy_from_slice(&words);
            prop_assert_eq!(u64::from_le_bytes(wide) as f64, word(shared));
        }
    }

    #[test]
    fn every_vector_unit_gives_the_same_bits(tensors in gradients(2..=3), which in 0_usize..6, key in any::<[u8; 32]>()) {
        let (dtype, compress) = [
            (Dtype::F32, Compress::None), (Dtype::F32, Compress::Bf16), (Dtype::F32, Compress::Int8),
            (Dtype::F16, Compress::None), (Dtype::Bf16, Compress::Int8), (Dtype::Bf16, Compress::None),
        ][which];
        for members in [3, 40] {
            let wire = Wire::of(dtype, compress, members).unwrap();
            let values: Vec<f32> = tensors[0].iter().map(|x| if dtype == Dtype::F16 { x.clamp(-6e4, 6e4) } else { *x }).collect();
            let tensor = bytes(dtype, &values);
            let shared = fixed::block_exponents(wire, dtype, &tensor, None).unwrap();
            let key = TagKey::new(&Digest(key));
            let mut wanted = None;
            for level in Level::supported() {
                let mut words = vec![0; values.len() * wire.input().len()];
                let mut residual = vec![0.25; values.len()];
                fixed::quantise_at(level, wire, dtype, &tensor, &shared, &mut words, None);
                let plain = words.clone();
                fixed::quantise_at(level, wire, dtype, &tensor, &shared, &mut words, Some(&mut residual));
                let mut sum = vec![1; values.len() * wire.output().len()];
                fixed::sum_into_at(level, wire, &mut sum, &plain);
                let mut tags = Vec::new();
                key.tags_at(level, &plain, wire.input(), &mut tags);
                key.tags_at(level, &sum, wire.output(), &mut tags);
                let all = (plain, words, residual.iter().map(|r| r.to_bits()).collect::<Vec<_>>(), sum, tags);
                prop_assert!(wanted.get_or_insert_with(|| all.clone()) == &all, "{} differs", level.name());
            }
        }
    }
}

#[test]
fn the_largest_floats_do_not_poison_the_residual() {
    for compress in [Compress::Bf16, Compress::Int8] {
        let wire = Wire::of(Dtype::F32, compress, 1).unwrap();
        let raw = bytes(Dtype::F32, &[f32::MAX, f32::MIN, 1.0]);
        let shared = fixed::block_exponents(wire, Dtype::F32, &raw, None).unwrap();
        let mut residual = vec![0.0; 3];
        fixed::quantise(wire, Dtype::F32, &raw, &shared, &mut vec![0; 3 * wire.input().len()], Some(&mut residual));
        assert!(residual.iter().all(|r| r.is_finite()), "{residual:?}");
    }
}

#[test]
fn a_sum_beyond_its_range_is_named() {
    let wire = Wire::of(Dtype::F32, Compress::None, 4).unwrap();
    let mut sum = vec![0; 5_000 * 4];
    assert_eq!(fixed::finish(wire, &sum, 3), Ok(()));
    sum[4_500 * 4..4_501 * 4].copy_from_slice(&(3 * (1 << 28) + 1_i32).to_le_bytes());
    assert_eq!(fixed::finish(wire, &sum, 3), Err(Refusal { index: 4_500, kind: RefusalKind::Overflow }));
    assert_eq!(fixed::finish(wire, &sum, 4), Ok(()));
    for (word, least) in [(Word::W8, vec![0x80]), (Word::W16, vec![0, 0x80]), (Word::W32, vec![0, 0, 0, 0x80])] {
        assert!(!fixed::check_range(word, &least, (1 << (8 * word.len() - 1)) - 1), "{word:?}");
    }
}

/// Tags from their definition.
fn naive_tag(key: &[u64], words: &[i64]) -> u64 {
    let sum = words.iter().zip(key).map(|(x, r)| i128::from(*x).rem_euclid(P.into()) as u128 * u128::from(*r));
    (sum.fold(0, |sum, term| (sum + term) % u128::from(P))) as u64
}

/// The numbers r, read back as the tags of unit vectors.
fn numbers(key: &TagKey, count: usize) -> Vec<u64> {
    let unit = |k: usize| {
        let mut words = vec![0; count];
        words[k] = 1;
        key.tag(&words, Word::W8)
    };
    (0..count).map(unit).collect()
}

fn encode(word: Word, values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()[..word.len()].to_vec()).collect()
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn tags_are_what_they_are_defined_as(
        key in any::<[u8; 32]>(), which in 0_usize..4, values in vec(prop_oneof![any::<i64>(), Just(i64::MIN), Just(i64::MAX), -3_i64..3], 0..120),
    ) {
        let key = TagKey::new(&Digest(key));
        let word = [Word::W8, Word::W16, Word::W32, Word::W64][which];
        let shift = 64 - 8 * word.len() as u32;
        let values: Vec<i64> = values.iter().map(|v| (v << shift) >> shift).collect();
        prop_assert_eq!(key.tag(&encode(word, &values), word), naive_tag(&numbers(&key, values.len()), &values));
    }

    #[test]
    fn tags_add_up_as_words_do(
        seed in any::<[u8; 32]>(), members in vec(vec(-(1_i64 << 26)..=1 << 26, 9_000), 2..5), at in any::<prop::sample::Index>(),
        change in prop_oneof![Just(1_i64), Just(-1), Just(1 << 28), Just(-(1 << 27))],
    ) {
        let key = TagKey::new(&Digest(seed));
        let mut total = vec![0_i64; 9_000];
        let mut sums = vec![0; 3];
        for member in &members {
            total.iter_mut().zip(member).for_each(|(t, m)| *t += m);
            let mut own = Vec::new();
            key.tags(&encode(Word::W32, member), Word::W32, &mut own);
            tags::add_all(&mut sums, &own);
        }
        let of = |values: &[i64], word| {
            let mut tags = Vec::new();
            key.tags(&encode(word, values), word, &mut tags);
            tags
        };
        prop_assert_eq!(&of(&total, Word::W32), &sums);
        prop_assert_eq!(&of(&total, Word::W64), &sums);
        // Any one integer that is changed shows in its group, and only there.
        let place = at.index(total.len());
        total[place] += change;
        let changed = of(&total, Word::W64);
        for (group, (changed, right)) in changed.iter().zip(&sums).enumerate() {
            prop_assert_eq!(changed != right, group == place / GROUP);
        }
        // p more is no change for a tag: only the range tells.
        total[place] += P as i64 - change;
        prop_assert_eq!(&of(&total, Word::W64), &sums);
        prop_assert!(!fixed::check_range(Word::W64, &encode(Word::W64, &total), (1 << 26) * members.len() as u64));
    }

    #[test]
    fn every_bit_flipped_shows(seed in any::<[u8; 32]>(), at in 0_usize..GROUP) {
        let key = TagKey::new(&Digest(seed));
        for word in [Word::W8, Word::W16, Word::W32] {
            let mut words = vec![0; (at + 1) * word.len()];
            for bit in 0..8 * word.len() {
                words[at * word.len() + bit / 8] = 1 << (bit % 8);
                prop_assert!(key.tag(&words, word) != 0, "{word:?} {at} {bit}");
                words[at * word.len() + bit / 8] = 0;
            }
        }
    }

    #[test]
    fn exact_mode_is_the_naive_loop(
        dtype in prop::sample::select(Dtype::ALL.to_vec()), members in 1_usize..6, len in 1_usize..1_200, seed in any::<u64>(),
        odd in any::<bool>(),
    ) {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 | (state >> 1) as u32 & 0xffff_0000
        };
        // Any bits: NaN, infinities and -0 among them; or small numbers.
        let inputs: Vec<Vec<u8>> = (0..members).map(|_| {
            (0..len * dtype.len()).map(|i| if odd || !dtype.is_float() || i % dtype.len() < dtype.len() - 1 { next() as u8 } else { 0x3f }).collect()
        }).collect();
        let slices: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        for op in [ExactOp::Sum, ExactOp::Mean, ExactOp::Min, ExactOp::Max] {
            let wanted = naive(op, dtype, &slices);
            for level in Level::supported() {
                let mut out = vec![0; len * dtype.len()];
                exact::reduce_at(level, op, dtype, &slices, &mut out);
                prop_assert!(out == wanted, "{op:?} {dtype:?} {}", level.name());
            }
        }
    }
}

/// One element after the other, one member after the other.
fn naive(op: ExactOp, dtype: Dtype, inputs: &[&[u8]]) -> Vec<u8> {
    let len = dtype.len();
    let count = inputs.len();
    let at = |member: usize, k: usize| &inputs[member][k * len..(k + 1) * len];
    let mut out = Vec::new();
    macro_rules! float {
        ($acc:ty, $load:expr, $store:expr) => {
            for k in 0..inputs[0].len() / len {
                let mut acc: $acc = $load(at(0, k));
                for member in 1..count {
                    let x: $acc = $load(at(member, k));
                    acc = match op {
                        ExactOp::Sum | ExactOp::Mean => acc + x,
                        _ if acc.is_nan() || x.is_nan() => <$acc>::NAN,
                        ExactOp::Min => {
                            if x.total_cmp(&acc).is_lt() {
                                x
                            } else {
                                acc
                            }
                        }
                        ExactOp::Max => {
                            if x.total_cmp(&acc).is_gt() {
                                x
                            } else {
                                acc
                            }
                        }
                    };
                }
                if op == ExactOp::Mean {
                    acc /= count as $acc;
                }
                if acc.is_nan() {
                    acc = <$acc>::NAN;
                }
                out.extend($store(acc.abs().copysign(acc)).to_le_bytes());
            }
        };
    }
    macro_rules! int {
        ($int:ty, $wide:ty) => {
            for k in 0..inputs[0].len() / len {
                let values: Vec<$wide> =
                    (0..count).map(|m| <$int>::from_le_bytes(at(m, k).try_into().unwrap()).into()).collect();
                let sum: $wide = values.iter().sum();
                let value = match op {
                    ExactOp::Sum => sum,
                    ExactOp::Mean => sum / count as $wide,
                    ExactOp::Min => *values.iter().min().unwrap(),
                    ExactOp::Max => *values.iter().max().unwrap(),
                };
                out.extend((value as $int).to_le_bytes());
            }
        };
    }
    match dtype {
        Dtype::F32 => float!(f32, |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap()), |x: f32| x),
        Dtype::F64 => float!(f64, |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap()), |x: f64| x),
        Dtype::F16 => float!(f32, |b: &[u8]| f16_to_f32(u16::from_le_bytes(b.try_into().unwrap())), f32_to_f16),
        Dtype::Bf16 => float!(f32, |b: &[u8]| bf16_to_f32(u16::from_le_bytes(b.try_into().unwrap())), f32_to_bf16),
        Dtype::I32 => int!(i32, i64),
        Dtype::I64 => int!(i64, i128),
    }
    out
}

#[test]
fn rho_depends_on_everything() {
    let (round, sum, commits, nonces) = (RoundId([1; 32]), Digest([2; 32]), [Digest([3; 32]); 2], [[4; 32]; 2]);
    let base = tags::rho(&round, 5, &sum, &commits, &nonces);
    let others = [
        tags::rho(&RoundId([9; 32]), 5, &sum, &commits, &nonces),
        tags::rho(&round, 6, &sum, &commits, &nonces),
        tags::rho(&round, 5, &Digest([9; 32]), &commits, &nonces),
        tags::rho(&round, 5, &sum, &commits[..1], &nonces),
        tags::rho(&round, 5, &sum, &[Digest([3; 32]), Digest([9; 32])], &nonces),
        tags::rho(&round, 5, &sum, &commits, &[[4; 32], [0; 32]]),
    ];
    assert!(others.iter().all(|other| *other != base));
}

//! The members' numbers, and the sum that owes nothing to the mesh.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::args::{BenchArgs, Op};

/// Numbers that are made and checked at once: the check holds two blocks, whatever the tensor's size.
const BLOCK: usize = 1 << 16;

/// Standard normal numbers of one block of a member's tensor (Box and Muller, 1958).
fn fill(seed: u64, member: usize, block: usize, out: &mut [f32]) {
    let mut key = [0; 32];
    for (part, value) in key.chunks_exact_mut(8).zip([seed, member as u64, block as u64]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    for pair in out.chunks_mut(2) {
        // In (0, 1]: its logarithm is finite.
        let (u, v) = (1.0 - rng.random::<f32>(), rng.random::<f32>());
        let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
        let radius = (-2.0 * u.ln()).sqrt();
        for (slot, value) in pair.iter_mut().zip([radius * cos, radius * sin]) {
            *slot = value;
        }
    }
}

/// A member's whole tensor.
pub(super) fn tensor(seed: u64, member: usize, elements: usize) -> Vec<f32> {
    let mut tensor = vec![0.0; elements];
    for (block, out) in tensor.chunks_mut(BLOCK).enumerate() {
        fill(seed, member, block, out);
    }
    tensor
}

/// How far the result in `file` is from the sum in f64, relative to the sum of the members' norms.
pub(super) fn error(file: &Path, args: &BenchArgs) -> std::io::Result<f64> {
    let mut file = File::open(file)?;
    let members = if args.op == Op::Broadcast { 1 } else { usize::from(args.members) };
    // A mean is compared as the sum that it stands for.
    let times = if args.op == Op::Mean { f64::from(args.members) } else { 1.0 };
    let (mut bytes, mut own, mut sum) = (vec![0; BLOCK * 4], vec![0.0_f32; BLOCK], vec![0.0_f64; BLOCK]);
    let mut norms = vec![0.0_f64; members];
    let mut off = 0.0_f64;
    let mut left = args.elements();
    let mut block = 0;
    while left > 0 {
        let len = left.min(BLOCK);
        let (bytes, own, sum) = (&mut bytes[..len * 4], &mut own[..len], &mut sum[..len]);
        file.read_exact(bytes)?;
        sum.fill(0.0);
        for (member, norm) in norms.iter_mut().enumerate() {
            fill(args.seed, member, block, own);
            for (sum, value) in sum.iter_mut().zip(own.iter()) {
                *sum += f64::from(*value);
                *norm += f64::from(*value).powi(2);
            }
        }
        for (wanted, got) in sum.iter().zip(bytes.chunks_exact(4)) {
            let got = f32::from_le_bytes([got[0], got[1], got[2], got[3]]);
            off += (f64::from(got) * times - wanted).powi(2);
        }
        (left, block) = (left - len, block + 1);
    }
    let longer = file.read(&mut [0])? > 0;
    // Not a number stays one: it is above every bound.
    Ok(if longer { f64::INFINITY } else { off.sqrt() / norms.iter().map(|norm| norm.sqrt()).sum::<f64>() })
}

//! Runs the vectors of `refimpl vectors` against the Q8_0 and Q4_K decoders below, which use nothing but std.
//!
//!     rustc --edition 2021 -O -o run_vectors_rs tools/run_vectors.rs && ./run_vectors_rs DIR
use std::fs;

fn half(b: &[u8]) -> f32 {
    let h = u16::from_le_bytes([b[0], b[1]]) as u32;
    let (sign, exponent, mantissa) = (h >> 15 << 31, h >> 10 & 31, h & 1023);
    match exponent {
        0 => f32::from_bits(sign | (mantissa as f32 * 2f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

fn q8_0(block: &[u8]) -> Vec<f32> {
    block[2..].iter().map(|&q| half(block) * q as i8 as f32).collect()
}

fn q4_k(block: &[u8]) -> Vec<f32> {
    let (d, dmin, s, qs) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
    let weight = |i: usize| {
        let j = i / 32;
        let (scale, min) = match j {
            0..=3 => (s[j] & 63, s[j + 4] & 63),
            _ => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
        };
        let code = qs[j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15;
        d * scale as f32 * code as f32 - dmin * min as f32
    };
    (0..256).map(weight).collect()
}

fn main() {
    let dir = std::env::args().nth(1).expect("run_vectors_rs DIR");
    let (mut passed, mut failed) = (0, 0);
    for line in fs::read_to_string(format!("{dir}/index.tsv")).unwrap().lines() {
        let word: Vec<&str> = line.split('\t').collect();
        let (size, decode): (usize, fn(&[u8]) -> Vec<f32>) = match word[0].split('/').take(2).collect::<Vec<_>>()[..] {
            ["decode", "q8_0"] => (34, q8_0),
            ["decode", "q4_k"] => (144, q4_k),
            _ => continue,
        };
        let number = |i: usize| word[i].parse::<usize>().unwrap();
        let read = |i: usize| fs::read(format!("{dir}/{}", word[i])).unwrap()[number(i + 1)..][..number(i + 2)].to_vec();
        let got: Vec<f32> = read(9).chunks(size).flat_map(decode).collect();
        let want: Vec<f32> = read(15).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        let right = got.len() == want.len() && got.iter().zip(&want).all(same);
        if right { passed += 1 } else { failed += 1; println!("differs: {}", word[0]) }
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(if failed > 0 { 1 } else if passed > 0 { 0 } else { 2 });
}

//! The guest: bytes in, bytes out, around the pure functions of the library.
//!
//! - `_start`: stdin is one or more images of 64 bytes; stdout gets a line of JSON for each, in order:
//!   `{"label":7,"scores":[0.000012,…]}`, ten probabilities with six decimals. Non-empty `/job/params` replaces the
//!   built-in parameters (little-endian f32), so that what `gradient` trained can be tried.
//! - `gradient`: stdin is the parameters, then one or more records of 65 bytes (image, label); stdout gets the mean
//!   loss and the mean gradient, little-endian f32.
//!
//! Input that is not so ends the guest with exit code 2 and one line on stderr. Nothing here reads clock, randomness,
//! arguments or environment.

use std::error::Error;
use std::io::{Read, Write};
use std::process::ExitCode;
use sundara_guest_digits::{Parameters, Prediction, TRAINED, classify, images, loss_gradient, records};

/// What the guest exits with when its input is not what it expects.
const EXIT_BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    match classify_input() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("digits: {error}");
            ExitCode::from(EXIT_BAD_INPUT)
        }
    }
}

/// The second entry: called instead of `_start`, and like it once in an instance.
#[unsafe(no_mangle)]
pub extern "C" fn gradient() {
    if let Err(error) = gradient_of_input() {
        eprintln!("digits: gradient: {error}");
        std::process::exit(EXIT_BAD_INPUT.into());
    }
}

fn classify_input() -> Result<(), Box<dyn Error>> {
    let parameters = parameters()?;
    let input = stdin()?;
    let images = images(&input)?;
    let mut lines = Vec::with_capacity(images.len() * 128);
    for image in images {
        push_line(&mut lines, &classify(&parameters, image));
    }
    stdout(&lines)
}

fn gradient_of_input() -> Result<(), Box<dyn Error>> {
    let input = stdin()?;
    let (parameters, batch) =
        input.split_at_checked(Parameters::BYTES).ok_or("the input ends within the parameters")?;
    let (loss, gradient) = loss_gradient(&Parameters::from_bytes(parameters)?, &records(batch)?);
    let mut output = Vec::with_capacity(4 + Parameters::BYTES);
    output.extend(loss.to_le_bytes());
    output.extend(gradient.iter().flat_map(|value| value.to_le_bytes()));
    stdout(&output)
}

fn parameters() -> Result<Parameters, Box<dyn Error>> {
    // A host without /job is one that passes no parameters.
    let given = std::fs::read("/job/params").unwrap_or_default();
    Ok(Parameters::from_bytes(if given.is_empty() { TRAINED } else { &given })?)
}

fn stdin() -> std::io::Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    Ok(input)
}

fn stdout(output: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut stdout = std::io::stdout();
    stdout.write_all(output)?;
    Ok(stdout.flush()?)
}

fn push_line(lines: &mut Vec<u8>, prediction: &Prediction) {
    lines.extend(b"{\"label\":");
    lines.push(b'0' + prediction.label);
    lines.extend(b",\"scores\":");
    let mut separator = b'[';
    for score in prediction.scores {
        lines.push(separator);
        push_decimal(lines, score);
        separator = b',';
    }
    lines.extend(b"]}\n");
}

/// Six decimals, without the float formatter: it would be the largest part of the module.
fn push_decimal(lines: &mut Vec<u8>, score: f32) {
    let mut millionths = (f64::from(score) * 1e6 + 0.5) as u32;
    let mut digits = *b"0.000000";
    for position in [7, 6, 5, 4, 3, 2] {
        digits[position] = b'0' + (millionths % 10) as u8;
        millionths /= 10;
    }
    digits[0] = b'0' + (millionths % 10) as u8;
    lines.extend(digits);
}

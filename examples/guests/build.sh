#!/bin/sh
# Builds the wasm guests so that the same sources give the same bytes wherever they stand.
#
#   build.sh digits        builds digits/digits.wasm, which is committed
#   build.sh embed [FILE]  builds embed/embed.wasm (or FILE), which is not
#
# Needs rustup's toolchain of rust-toolchain.toml with the target wasm32-wasip1. CARGO_TARGET_DIR is honoured.
set -eu

guests=$(cd "$(dirname "$0")" && pwd)
guest=${1:?usage: build.sh digits|embed [FILE]}
output=${2:-$guests/$guest/$guest.wasm}
cargo_home=${CARGO_HOME:-$HOME/.cargo}
target=${CARGO_TARGET_DIR:-$guests/$guest/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
case $output in /*) ;; *) output=$PWD/$output ;; esac

# Only the guest's own .cargo/config.toml counts, plus the paths to leave out: RUSTFLAGS would replace it.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET CARGO_BUILD_RUSTFLAGS
cd "$guests/$guest"
remap="['--remap-path-prefix=$cargo_home=/cargo', '--remap-path-prefix=$guests/$guest=/guest']"
cargo build --release --locked --target wasm32-wasip1 --bin "$guest" --target-dir "$target" \
    --config "target.wasm32-wasip1.rustflags=$remap"

built=$target/wasm32-wasip1/release/$guest.wasm
for path in "$cargo_home" "$guests"; do
    if grep -qF "$path" "$built"; then
        echo "build.sh: $built contains the path $path" >&2
        exit 1
    fi
done
cp "$built" "$output"
echo "$output: $(wc -c < "$output") bytes"

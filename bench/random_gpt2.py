"""Make GPT-2 124M with random weights and its real vocabulary, for machines without a hub.

    python bench/random_gpt2.py VOCABULARY FOLDER

VOCABULARY is a folder with vocab.json and merges.txt, or with the same under the names that OpenAI
gave them: encoder.json and vocab.bpe. Time depends on shapes alone, so it is that of the real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer


def main() -> None:
    vocabulary, folder = map(Path, sys.argv[1:])
    known = {path.name: str(path) for path in vocabulary.iterdir()}
    files = (
        known.get("vocab.json", known.get("encoder.json")),
        known.get("merges.txt", known.get("vocab.bpe")),
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).to(torch.bfloat16).save_pretrained(folder)
    GPT2Tokenizer(*files).save_pretrained(folder)


if __name__ == "__main__":
    main()

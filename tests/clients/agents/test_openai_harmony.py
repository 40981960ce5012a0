"""With the whole vocabulary of gpt-oss, token for token: prompts as openai-harmony renders them,
and answers as it reads them.

The other tests of harmony have a small vocabulary, and compare texts that openai-harmony wrote.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "models"), str(TESTS)]

from harmony_chats import ANSWERS, CHATS, ON  # noqa: E402
from test_formats import assembled  # noqa: E402
from test_harmony import GOLDEN, TOOLS, folded, turn_of  # noqa: E402

from ruvon.models.byte_level import BYTE_OF  # noqa: E402
from ruvon.models.chat import load_chat  # noqa: E402
from ruvon.models.tokenizer import Tokenizer  # noqa: E402
from ruvon.models.vocab import read_vocab  # noqa: E402
from ruvon.models.vocab_gguf import GPT4O  # noqa: E402

MARKS = {
    199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>",
    200003: "<|constrain|>", 200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>",
    200008: "<|message|>", 200012: "<|call|>",
}  # fmt: skip
SIZE = 201088
NUM_STREAMS = 400


def read_ranks() -> dict[bytes, int]:
    """o200k_base, from the wheel of bpe-openai beside the interpreter."""
    home = Path(os.environ["RUVON_CLIENT"]).parents[1]
    (file,) = home.glob("lib/python*/site-packages/bpe_openai/data/o200k_base.tiktoken.gz")
    lines = gzip.decompress(file.read_bytes()).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that each token is merged of, in the order of the tokens."""
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def write_vocabulary(path: Path) -> None:
    """A tokenizer.json such as gpt-oss has."""
    ranks = read_ranks()
    char_of = {byte: char for char, byte in BYTE_OF.items()}
    spelt = {token: "".join([char_of[byte] for byte in token]) for token in ranks}
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    merges = [(spelt[left], spelt[right]) for left, right in merges_of(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4O), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = (MARKS.get(id, f"<|reserved_{id}|>") for id in range(len(ranks), SIZE))
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.save(str(path))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "tokenizer.json")
    return Tokenizer(read_vocab(folder, {}))


@pytest.fixture(scope="session")
def streams(tokenizer: Tokenizer) -> list[list[int]]:
    """Answers that are well written: those of the other tests, and others drawn at random."""
    written = [*ANSWERS, *(draw_answer(random.Random(seed)) for seed in range(NUM_STREAMS))]
    return [
        tokenizer.encode(each, add_special_tokens=False, parse_special=True) for each in written
    ]


@pytest.fixture(scope="session")
def oracle(streams: list[list[int]]) -> dict[str, Any]:
    done = subprocess.run(
        [os.environ["RUVON_CLIENT"], str(TESTS / "models" / "harmony_oracle.py"), "-"],
        input=json.dumps(streams), check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def draw_answer(draw: random.Random) -> str:
    headers = (
        "<|channel|>analysis", "<|channel|>final", "<|channel|>commentary",
        "<|channel|>commentary to=functions.weather <|constrain|>json",
        " to=functions.anything<|channel|>commentary json",
        " to=functions.weather<|channel|>analysis",
    )  # fmt: skip
    messages = []
    for _ in range(draw.randint(1, 5)):
        header = draw.choice(headers)
        text = draw_object(draw) if "to=" in header else draw_text(draw)
        messages.append(f"{header}<|message|>{text}")
    return ON.join(messages) + draw.choice(("<|return|>", "<|call|>", "<|end|>"))


def draw_text(draw: random.Random) -> str:
    """Of all planes, spread over many tokens."""
    pieces = (
        "Hello",
        " world",
        "\n\n",
        "naïve",
        "日本語",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "{",
        '"',
        "1234",
        "Ünïcödé",
        "\u200b",
    )
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 12)))


def draw_object(draw: random.Random) -> str:
    value = {draw_text(draw): draw_text(draw) for _ in range(draw.randint(0, 3))}
    return json.dumps(value, ensure_ascii=draw.random() < 0.5)


def test_the_vocabulary_is_gpt_osses(tokenizer):
    assert tokenizer.vocab_size == SIZE
    assert {tokenizer.added_ids[text]: text for text in MARKS.values()} == MARKS


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_is_openai_harmonys(name, tokenizer, oracle):
    found = list(turn_of(CHATS[name], load_chat(tokenizer)).prompt)
    assert tokenizer.decode(found, skip_special_tokens=False) == oracle["prompts"][name]["text"]
    assert found == oracle["prompts"][name]["ids"]


def test_what_the_other_tests_compare_with_is_as_it_was(oracle):
    prompts = {name: prompt["text"] for name, prompt in oracle["prompts"].items()}
    assert {"prompts": prompts, "answers": oracle["answers"][: len(ANSWERS)]} == GOLDEN


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1 << 20])
def test_an_answer_is_openai_harmonys_however_it_is_cut(cut, tokenizer, streams, oracle):
    turn = load_chat(tokenizer).turn([{"role": "user", "content": "Hi"}], tools=TOOLS)
    for ids, expected in zip(streams, oracle["answers"], strict=True):
        assert expected is not None
        found = read(ids, cut, tokenizer, turn)
        assert found == folded(expected), tokenizer.decode(ids, skip_special_tokens=False)


def read(ids: Sequence[int], cut: int, tokenizer: Tokenizer, turn: Any) -> dict[str, Any]:
    parser = turn.parser(tokenizer.stream(prompt_ids=turn.prompt))
    deltas = [d for at in range(0, len(ids), cut) for d in parser.push(ids[at : at + cut])]
    found = assembled(deltas + parser.finish())
    del found["num_reasoning"]
    return found

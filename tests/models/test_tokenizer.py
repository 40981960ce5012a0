"""Encoding against transformers; special tokens; bytes of tokens; folders of all kinds."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from texts import DONE, END, START, mixed_strings, trained, trained_json
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from ruvon.errors import LoadError, RequestError
from ruvon.models.byte_level import byte_level_bytes
from ruvon.models.tokenizer import LONG, Tokenizer, load_tokenizer
from ruvon.models.vocab import Vocab, surround


def write_folder(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(trained_json())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, format: str = "safetensors", **generation: Any) -> Tokenizer:
    checkpoint = SimpleNamespace(
        format=format, path=folder, words=folder, config={}, generation=generation
    )
    return load_tokenizer(checkpoint)


def sentencepiece(prepend: str | None, normalizer: bool = False) -> tokenizers.Tokenizer:
    """A Llama-like tokenizer over few pieces; the leading space comes from Metaspace or, in older
    files, from a normalizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "h", "i", "a", "▁h", "hi", "▁hi", "▁▁"]
    merges = [("▁", "h"), ("h", "i"), ("▁h", "i"), ("▁", "hi"), ("▁", "▁")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if normalizer:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend or "never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prepend else [])
    )
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in pieces[:3]]
    )
    return backend


@pytest.mark.parametrize("bos", [False, True])
def test_folder_equals_transformers(tmp_path, bos):
    folder = write_folder(tmp_path, bos_token=START, add_bos_token=True)  # has no say
    if bos:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        surround(backend, backend.token_to_id(START), None)
        backend.save(str(folder / "tokenizer.json"))
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in mixed_strings(2000, seed=3):
        ids = theirs.encode(text)
        assert ours.encode(text, parse_special=True) == ids, repr(text)
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True), repr(text)
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse_special=True, add_special_tokens=False) == bare
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert (ours.encode("a")[0] == ours.bos_id) == bos
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files_equal_the_same_vocabulary_in_one_file(tmp_path, names):
    model = json.loads(trained_json())["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    lines = [f"{left} {right}\n" for left, right in model["merges"]]
    (tmp_path / names[1]).write_text("#version: 0.2\n" + "".join(lines))
    ours, expected = load(tmp_path), trained()
    for text in mixed_strings(300, seed=4):
        text = text.replace("<think>", "")  # only tokenizer.json knows this one
        assert ours.encode(text) == expected.encode(text), repr(text)
    (end,) = ours.encode(DONE, parse_special=True)
    assert ours.special_ids == {end}
    assert (ours.bos_id, ours.eos_ids) == (end, (end,))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "1"}')
    assert load(tmp_path).encode("a")[0] == load(tmp_path).bos_id == expected.encode("1")[0]


def test_special_tokens_in_text_stay_text_unless_parsed():
    tokenizer = trained()
    ids = tokenizer.encode(f"a{END}b")
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == f"a{END}b"
    parsed = tokenizer.encode(f"a{END}b", parse_special=True)
    assert len(parsed) == 3
    assert parsed[1] in tokenizer.special_ids
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == f"a{END}b"
    both = (tokenizer.encode("<think>"), tokenizer.encode("<think>", parse_special=True))
    assert both[0] == both[1]
    assert len(both[0]) == 1  # an added token that is not special is a word like any other


def test_long_text_takes_the_other_road_to_the_same_ids():
    tokenizer = trained()
    text = "".join(mixed_strings(400, seed=5))
    assert len(text) > LONG
    backend = tokenizers.Tokenizer.from_str(trained_json())
    assert tokenizer.encode(text, parse_special=True) == backend.encode(text).ids
    backend.encode_special_tokens = True
    assert tokenizer.encode(text) == backend.encode(text).ids


def test_threads_may_encode_at_once():
    tokenizer, texts = trained(), mixed_strings(200, seed=6)
    expected = [tokenizer.encode(text, parse_special=i % 2 == 0) for i, text in enumerate(texts)]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda i: tokenizer.encode(texts[i], parse_special=i % 2 == 0), range(200))
        assert list(got) == expected


@pytest.mark.parametrize("text", ["\ud800", "x" * LONG + "\udfff"])
def test_lone_surrogates_are_the_clients_fault(text):
    with pytest.raises(RequestError, match="surrogate"):
        trained().encode(text)


def test_token_bytes_join_to_the_text():
    tokenizer = trained()
    for text in mixed_strings(300, seed=7):
        ids = tokenizer.encode(text, parse_special=True)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_token_bytes_of_special_and_unknown_ids():
    tokenizer = trained()
    (end,) = tokenizer.encode(END, parse_special=True)
    assert tokenizer.token_bytes(end) == END.encode()
    for id in (tokenizer.vocab_size, 1 << 40, -1):
        assert tokenizer.token_bytes(id) == b""
        assert tokenizer.token_text(id) == ""
    assert tokenizer.decode([tokenizer.vocab_size, end], skip_special_tokens=False) == END


def test_token_text_shows_parts_of_characters():
    tokenizer = load(Path("/nowhere"), "dummy")
    ids = tokenizer.encode("é")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"\xc3", b"\xa9"]
    assert [tokenizer.token_text(id) for id in ids] == ["\ufffd", "\ufffd"]
    assert tokenizer.decode(ids) == "é"


@pytest.mark.parametrize("prepend", ["always", "first", None])
@pytest.mark.parametrize("normalizer", [False, True])
def test_sentencepiece_decodes_as_the_library_does(prepend, normalizer):
    backend = sentencepiece(prepend, normalizer)
    tokenizer = Tokenizer(Vocab(backend))
    for text in ("hi", " hi", "  hi", "hi hi", "héhi 🙂\n", "", " ", "hi</s>hi"):
        ids = tokenizer.encode(text, parse_special=True)
        assert ids == backend.encode(text).ids
        for skip in (True, False):
            expected = backend.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, repr(text)


def test_sentencepiece_bytes():
    tokenizer = Tokenizer(Vocab(sentencepiece("first")))
    ids = tokenizer.encode("hi é")
    assert [tokenizer.token_bytes(id) for id in ids] == [b" hi", b" ", b"\xc3", b"\xa9"]


def test_restored_stretches_are_encoded_as_if_never_replaced():
    tokenizer = trained()
    for text in mixed_strings(300, seed=8):
        literal = text.replace("<", "\U000f0000")
        ids = tokenizer.encode_guarded(f"{START}{literal}{END}", {0xF0000: "<"})
        assert ids[1:-1] == tokenizer.encode(text), repr(text)
        assert {ids[0], ids[-1]} <= tokenizer.special_ids


def test_restored_stretches_get_no_leading_space_of_their_own():
    tokenizer = Tokenizer(Vocab(sentencepiece("first")))
    guarded = tokenizer.encode_guarded("hi</s>hi\U000f0000", {0xF0000: "a"})
    assert guarded == tokenizer.encode("hi</s>hia", parse_special=True)


def test_special_spans():
    tokenizer = trained()
    assert tokenizer.special_spans(f"é{END} {START}") == [(1, 11), (12, 24)]
    assert tokenizer.special_spans("<|im_end|") == []


def test_eos_ids_are_the_tokenizers_and_the_generation_configs(tmp_path):
    folder = write_folder(tmp_path)
    (end,) = trained().encode(END, parse_special=True)
    assert load(folder).eos_ids == (end,)
    assert load(folder, eos_token_id=0).eos_ids == (end, 0)
    assert load(folder, eos_token_id=[5, end]).eos_ids == (end, 5)


def test_tokens_that_only_the_config_knows_are_added(tmp_path):
    size = trained().vocab_size
    added = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False}
    folder = write_folder(
        tmp_path,
        added_tokens_decoder={str(size): {**added, "single_word": False, "normalized": False}},
        unk_token={"__type": "AddedToken", "content": "Hello"},
    )
    tokenizer = load(folder)
    assert tokenizer.encode("a<tool>", parse_special=True)[-1] == size
    assert tokenizer.encode("Hello", parse_special=True)[0] in tokenizer.special_ids
    assert tokenizer.vocab_size == size + 1


def test_chat_templates_are_found_in_every_place(tmp_path):
    assert load(write_folder(tmp_path)).chat_template is None
    assert load(write_folder(tmp_path, chat_template="one")).chat_template == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load(write_folder(tmp_path, chat_template=named))
    assert tokenizer.chat_templates == {"default": "two", "tool_use": "tools"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "three"}')
    assert load(tmp_path).chat_templates == {"default": "three"}
    (tmp_path / "chat_template.jinja").write_text("four")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    assert load(tmp_path).chat_templates == {"default": "four", "tool_use": "five"}


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained_json())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    for parse in (False, True):
        expected = trained().encode("1 2 3 4", parse_special=parse)
        assert load(tmp_path).encode("1 2 3 4", parse_special=parse) == expected


def test_a_folder_without_a_vocabulary_names_what_it_looked_for(tmp_path):
    with pytest.raises(LoadError, match=r"tokenizer\.json.*vocab\.json and merges\.txt"):
        load(tmp_path)
    assert load(tmp_path, format="dummy").vocab_size == 256


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{,")],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    write_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(LoadError, match=name):
        load(tmp_path)


def test_a_vocabulary_that_cannot_be_converted_is_an_error(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    with pytest.raises(LoadError, match="cannot be converted"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "no decoder"),
        (decoders.Sequence([]), "no decoder"),
        (decoders.WordPiece(), "decoder WordPiece is not supported"),
        (decoders.Metaspace("_"), "decoder Metaspace is not supported"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip("x")]), "ByteLevel and Strip"),
        (decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()]), "decoder Replace"),
    ],
)
def test_a_decoder_that_is_not_understood_is_refused_by_name(tmp_path, decoder, message):
    folder = write_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_str(trained_json())
    backend.decoder = decoder
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)


def test_a_byte_level_token_outside_the_alphabet_is_text():
    assert byte_level_bytes("Ġa") == b" a"
    assert byte_level_bytes("a b") == b"a b"  # a space is no letter of it
    assert byte_level_bytes("é→") == "é→".encode()


def test_nested_decoders_are_read_one_after_another(tmp_path):
    folder = write_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_str(trained_json())
    inner = decoders.Sequence([decoders.ByteLevel()])
    backend.decoder = decoders.Sequence([decoders.Sequence([inner]), decoders.Fuse()])
    backend.save(str(folder / "tokenizer.json"))
    ours = load(folder)
    for text in mixed_strings(100, seed=9):
        ids = ours.encode(text)
        assert ours.decode(ids) == backend.decode(ids) == text

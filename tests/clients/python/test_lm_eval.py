"""EleutherAI's evaluation harness: log-likelihoods by echo and logprobs, generation, perplexity."""

from __future__ import annotations

import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

ROWS = [
    {"question": f"say: {word}", "choices": [word, "something else that is longer"], "answer": 0}
    for word in ("blue", "two and two", "über")
]
SPLIT = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def evaluate(url, tmp_path_factory):
    """``evaluate(task, path) -> its metrics``."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | SPLIT | files | task))

    def work(task: str, model: str, path: str, **options: object) -> dict[str, float]:
        arguments = {
            "model": "scripted", "base_url": url + path, "num_concurrent": 2, "max_retries": 1,
        }  # fmt: skip
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments | options, tasks=[task], log_samples=True,
            task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
        )  # fmt: skip
        return found["results"][task]

    return work


COMPLETIONS = ("local-completions", "/v1/completions")


def test_multiple_choice(evaluate):
    """The scripted model's logprobs are all equal, so the shorter choice is the likelier one."""
    assert evaluate("choice", *COMPLETIONS)["acc,none"] == 1


def test_generation(evaluate):
    assert evaluate("generation", *COMPLETIONS)["exact_match,none"] == 1


def test_perplexity(evaluate):
    assert evaluate("rolling", *COMPLETIONS)["word_perplexity,none"] > 1

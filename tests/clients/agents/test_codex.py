"""Codex speaks Responses. To a model that it knows it offers apply_patch as a custom tool, which
takes text by a grammar; to others only the shell."""

from __future__ import annotations

from pathlib import Path

import pytest

MODELS = Path(__file__).parent / "codex" / "models.json"

CONFIG = """
model = "scripted"
model_provider = "ruvon"
{more}
[model_providers.ruvon]
name = "ruvon"
base_url = "{url}/v1"
env_key = "RUVON_API_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
"""
CATALOG = f'model_catalog_json = "{MODELS}"'
UNASKED = "--dangerously-bypass-approvals-and-sandbox"  # the project is the sandbox


@pytest.mark.parametrize("more", ["", CATALOG], ids=["shell", "custom"])
def test_mends_a_file(url, project, write, more):
    write(".codex/config.toml", CONFIG.format(url=url, more=more))
    last = project.home / "last.txt"
    project.run(
        "exec", UNASKED, "--output-last-message", str(last), project.task, RUVON_API_KEY="none"
    )
    assert last.read_text().strip() == "Done: add adds."
    project.assert_mended()


def test_goes_on_after_compaction(url, project, write):
    """With a limit this low it asks for a summary after every step, and goes on with that."""
    limit = "model_auto_compact_token_limit = 1000"
    write(".codex/config.toml", CONFIG.format(url=url, more=f"{CATALOG}\n{limit}"))
    said = project.run("exec", UNASKED, project.task, RUVON_API_KEY="none")
    assert "context compacted" in said
    assert "Done: add adds." in said
    project.assert_mended()

"""Codex speaks Responses; its tools are exec_command, and apply_patch within it."""

from __future__ import annotations

CONFIG = """
model = "scripted"
model_provider = "ruvon"
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
UNASKED = "--dangerously-bypass-approvals-and-sandbox"  # the project is the sandbox


def test_mends_a_file(url, project, write):
    write(".codex/config.toml", CONFIG.format(url=url))
    last = project.home / "last.txt"
    project.run(
        "exec", UNASKED, "--output-last-message", str(last), project.task, RUVON_API_KEY="none"
    )
    assert last.read_text().strip() == "Done: add adds."
    project.assert_mended()

"""Claude Code speaks Messages; its tools are Read and Edit."""

from __future__ import annotations

import json

QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "IS_SANDBOX": "1",  # the project is one
}


def test_mends_a_file(url, project):
    said = project.run(
        "-p", project.task, "--dangerously-skip-permissions", "--output-format", "json",
        ANTHROPIC_BASE_URL=url, ANTHROPIC_API_KEY="none", ANTHROPIC_MODEL="scripted", **QUIET,
    )  # fmt: skip
    result = json.loads(said[said.index("{") :].strip().split("\n")[-1])
    assert result["result"] == "Done: add adds."
    assert not result["is_error"]
    project.assert_mended()
    usage = result["usage"]  # of all requests; each begins as the one before, but for a line
    assert usage["cache_read_input_tokens"] > 2 * usage["input_tokens"]

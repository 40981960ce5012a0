"""aider edits by blocks in its answer's text."""

from __future__ import annotations

import pytest

OPTIONS = (
    "--model", "openai/scripted", "--edit-format", "diff", "--map-tokens", "0", "--yes-always",
    "--no-analytics", "--no-check-update", "--no-show-model-warnings", "--no-show-release-notes",
    "--no-gitignore", "--no-auto-commits", "--no-pretty", "--no-detect-urls",
    "--no-suggest-shell-commands",
)  # fmt: skip


@pytest.mark.parametrize("streamed", ["--stream", "--no-stream"])
def test_mends_a_file(url, project, streamed):
    said = project.run(
        *OPTIONS, streamed, "--message", project.task, "calc.py",
        OPENAI_API_BASE=url + "/v1", OPENAI_API_KEY="none", LITELLM_LOCAL_MODEL_COST_MAP="True",
    )  # fmt: skip
    assert "Applied edit to calc.py" in said
    project.assert_mended()

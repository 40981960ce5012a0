"""opencode speaks chat completions; its tools are read and edit."""

from __future__ import annotations

import json

import pytest

QUIET = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
}


@pytest.mark.parametrize(
    "package", ["@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic"]
)
def test_mends_a_file(url, project, package):
    config = {
        "model": "ruvon/scripted",
        "autoupdate": False,
        "share": "disabled",
        "permission": {"edit": "allow", "bash": "allow"},
        "provider": {
            "ruvon": {
                "npm": package,
                "options": {"baseURL": url + "/v1", "apiKey": "none"},
                "models": {"scripted": {"limit": {"context": 131072, "output": 4096}}},
            }
        },
    }
    (project.folder / "opencode.json").write_text(json.dumps(config))
    assert "Done: add adds." in project.run("run", project.task, **QUIET)
    project.assert_mended()

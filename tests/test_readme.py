"""The examples of README.md, run as they stand against a server as it says to start one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from embedded import needs_model, running

README = (Path(__file__).parent.parent / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n+```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
((COMMAND, ANSWER),) = re.findall(
    r"^```console\n\$ (curl.*?)\n(\{.*?)\n```$", README, re.MULTILINE | re.DOTALL
)

pytestmark = [needs_model, pytest.mark.slow]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running("--kv-cache-memory", "64MiB", anew=True) as process:
        url = process.wait_for("listening")["url"]
        process.wait_for("ready")
        yield str(url)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_an_example_prints_what_stands_below_it(address: str, code: str, printed: str):
    code = code.replace(ADDRESS, address)
    # Looking for slow callbacks, asyncio tells of the client's, too, where others keep it waiting.
    quiet = {name: it for name, it in os.environ.items() if name != "PYTHONASYNCIODEBUG"}
    exit_code, text = forked.run(["-c", code], quiet)
    assert exit_code == 0, text
    assert text.rstrip("\n") == printed.rstrip("\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_the_answer_that_stands_below_it(address: str):
    command = COMMAND.replace(ADDRESS, address)
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
    assert lasting(json.loads(done.stdout)) == lasting(json.loads(ANSWER))


def lasting(answer: dict) -> dict:
    """An answer without what is another every time, or depends on what was asked before."""
    del answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {key: answer[key] for key in answer.keys() - {"id", "created", "system_fingerprint"}}

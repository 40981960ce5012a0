"""schemathesis: what each operation of the OpenAPI document answers to what it allows and to what
it does not, a few examples of either, the same each time. None is a server error or another answer
than the document says, and none takes long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)
PATIENCE = 120  # seconds for the document, which is made when it is first asked for
PROGRAM = str(Path(sys.executable).with_name("schemathesis"))
OPTIONS = [
    "--checks", CHECKS, "--phases", "fuzzing", "--max-examples", "3", "--no-shrink",
    "--generation-deterministic", "--suppress-health-check", "too_slow,filter_too_much",
    "--request-timeout", "30", "--max-time", "400", "--report", "junit", "--report-junit-path",
]  # fmt: skip
"""One worker: several in one process break hypothesis, which reads the source of its lambdas. How
long it takes to think of a request is no matter of ours."""


def examine(url: str) -> dict[str, str]:
    """What was wrong with each operation; nothing, as a rule."""
    report, document = Path.cwd() / "operations.xml", Path.cwd() / "openapi.json"
    report.unlink(missing_ok=True)
    with urlopen(f"{url}/openapi.json", timeout=PATIENCE) as answer:  # its own is 10 seconds
        document.write_bytes(answer.read())
    command = [PROGRAM, "run", document.name, "--url", url, *OPTIONS, str(report)]
    subprocess.run(command, check=False)
    cases = ElementTree.parse(report).iter("testcase")
    return {
        case.get("name", "?"): "\n".join(
            f"{each.get('message')} {each.text}"
            for each in case
            if each.tag in ("failure", "error")
        )
        for case in cases
    }


FOUND = examine(os.environ["RUVON_URL"])


@pytest.mark.parametrize("operation", FOUND)
def test_an_operation(operation):
    assert FOUND[operation] == ""


def test_all_were_asked():
    assert len(FOUND) > 30

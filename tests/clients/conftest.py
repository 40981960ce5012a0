"""The server that clients talk to: ``make clients`` names it, the ordinary suite starts its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "RUVON_URL" not in os.environ:  # what needs packages of its own is only for `make clients`
    collect_ignore_glob = ["agents/*", "python/test_[!o]*", "python/test_openai_*"]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The server's address, without /v1."""
    if given := os.environ.get("RUVON_URL"):
        yield given
        return
    sys.path.append(str(Path(__file__).parents[1] / "server"))  # where its parts are
    from scripted import running  # in a client's own environment there is no ruvon

    with running("obedient") as address:
        yield address

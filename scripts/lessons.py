"""Runs the lessons of the series, and puts what they print under its marker in the articles.

    python scripts/lessons.py [02_greedy ...]

A marker names a lesson, such as

    <!-- output: docs/series/code/02_greedy.py -->

and the fence after it holds what the lesson prints. A number behind ``~`` was measured: it differs
from one run to the next, and from machine to machine. All else is always the same.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERIES = ROOT / "docs" / "series"
CODE = SERIES / "code"
LESSONS = sorted(CODE.glob("[0-9][0-9]_*.py"))
SHOWN = re.compile(
    r"^(<!-- output: docs/series/code/(\w+)\.py -->\n)```text\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
MEASURED = re.compile(r"~[\d.,]*\d")


def main() -> None:
    sys.path.insert(0, str(CODE))
    wanted = sys.argv[1:] or [path.stem for path in LESSONS]
    printed = {name: output(name) for name in wanted}
    for path in sorted(SERIES.glob("*.md")):
        text = path.read_text()
        if (fresh := SHOWN.sub(lambda match: shown(match, printed), text)) != text:
            path.write_text(fresh)
            print(f"Wrote {path.relative_to(ROOT)}")


def output(name: str) -> str:
    """What a lesson prints. Its folder must be on the path; the model is loaded once for all."""
    with redirect_stdout(io.StringIO()) as printed:
        import_module(name).main()
    return printed.getvalue()


def shown(match: re.Match[str], printed: dict[str, str]) -> str:
    """The marker and its fence, with what was printed if the lesson has run."""
    return f"{match[1]}```text\n{printed.get(match[2], match[3])}```"


def lasting(text: str) -> str:
    """What was printed, without what was measured."""
    return MEASURED.sub("~", text)


if __name__ == "__main__":
    main()

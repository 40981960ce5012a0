"""Puts the code that documents show under its marker, as it stands in the source.

    python scripts/fragments.py

A marker names a file and what is defined in it, such as

    <!-- source: ruvon/engine/policies.py sequential static -->

and the fence after it holds the source of these, so that no document shows code of its own making.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FRAGMENT = re.compile(
    r"^(<!-- source: (\S+) ([^>]+) -->\n)```python\n.*?^```$", re.MULTILINE | re.DOTALL
)


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        if (fresh := refreshed(text)) != text:
            path.write_text(fresh)
            print(f"Wrote {path.relative_to(ROOT)}")


def refreshed(text: str) -> str:
    """A document with every fragment as the source has it. Raises LookupError for what is gone."""

    def fragment(match: re.Match[str]) -> str:
        source = (ROOT / match[2]).read_text()
        code = "\n\n".join(definition(source, name) for name in match[3].split())
        return f"{match[1]}```python\n{code}\n```"

    return FRAGMENT.sub(fragment, text)


def definition(source: str, name: str) -> str:
    """The lines that define ``Class.method``, ``Class``, ``function`` or ``CONSTANT``."""
    start, end = span(source, name)
    return textwrap.dedent("\n".join(source.splitlines()[start - 1 : end]))


def span(source: str, name: str) -> tuple[int, int]:
    """The first and the last of these lines, counted from 1. Raises LookupError."""
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        found = [child for child in ast.iter_child_nodes(node) if part in names(child)]
        if not found:
            raise LookupError(f"there is no {name} in the source any more")
        node = found[0]
    assert isinstance(node, ast.stmt)
    first = [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]
    return min(first), node.end_lineno or node.lineno


def names(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


if __name__ == "__main__":
    main()

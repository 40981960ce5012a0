"""What the pictures of the series have in common: where they go, how they look, how lessons are
imported. Needs matplotlib (the extra `docs`)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "docs" / "series" / "pictures"
sys.path.insert(0, str(ROOT / "docs" / "series" / "code"))
llama = import_module("llama")

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"

mpl.rcParams.update({
    "font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "ruvon",
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
})  # fmt: skip


def save(figure: Figure, name: str) -> None:
    """The same figure is the same file: no date in it, and ids that do not change."""
    path = PICTURES / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    print(f"Wrote {path.relative_to(ROOT)}")

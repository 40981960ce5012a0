"""Fail if too small a share of branches is covered: coverage's own limit counts lines as well.

python scripts/branches.py REPORT.json PERCENT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(report: str, least: str) -> None:
    totals = json.loads(Path(report).read_text())["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"branches: {percent:.1f} % of {totals['num_branches']}, at least {least} % are wanted")
    if percent < float(least):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])

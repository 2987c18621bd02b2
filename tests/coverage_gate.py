"""Does the measured coverage suffice? `python -m tests.coverage_gate`, after `coverage json`.

Coverage's own `fail_under` weighs lines and branches into one percentage, so that plain lines can hide branches that
no test takes. Here the two have their own limits, and the critical files must be covered wholly. The limits are in
`pyproject.toml` under `[tool.simic.coverage]`.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def shortfalls(report: Mapping[str, Any], limits: Mapping[str, Any]) -> list[str]:
    """What is missing, one sentence each; empty when all limits are met.

    Args:
        report: The parsed output of `coverage json`, measured with branches.
        limits: `line_percent_min` and `branch_percent_min` over everything, and `whole`, the patterns of files in
            which every line and branch must have run.
    """
    totals = report["totals"]
    found = []
    for what, covered, possible, percent_min in (
        ("lines", totals["covered_lines"], totals["num_statements"], limits["line_percent_min"]),
        ("branches", totals["covered_branches"], totals["num_branches"], limits["branch_percent_min"]),
    ):
        if covered * 100 < percent_min * possible:
            found.append(f"{covered} of {possible} {what} ran, {percent_min} % are asked for")
    for pattern in limits["whole"]:
        for path, file in sorted(report["files"].items()):
            summary = file["summary"]
            missing = summary["missing_lines"] + summary["missing_branches"]
            if fnmatch(path, pattern) and missing:
                found.append(
                    f"{path}: {missing} lines or branches did not run, but this file is critical ({pattern})"
                )
    return found


def main() -> int:
    """Print what falls short and return the exit status."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    report = json.loads((REPOSITORY / settings["coverage"]["json"]["output"]).read_text())
    found = shortfalls(report, settings["simic"]["coverage"])
    for sentence in found:
        print(f"coverage: {sentence}", file=sys.stderr)
    if not found:
        totals = report["totals"]
        print(
            f"coverage: {totals['covered_lines']}/{totals['num_statements']} lines, "
            f"{totals['covered_branches']}/{totals['num_branches']} branches"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The repository's own promises: the lock, the doors, the documents, the gates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench import __main__ as benches
from bench import report
from tests.coverage_gate import shortfalls

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = (REPOSITORY / "requirements.lock").read_text()
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
REQUIREMENTS = REPOSITORY / "docs" / "requirements.md"
STATUSES = re.compile(r"done|planned: [A-Za-z].+|waits for a GPU: .+|decided: .+")


def locked() -> dict[str, str]:
    """Version of each locked distribution."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", LOCK, flags=re.MULTILINE))


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]).lower()


def rows() -> list[list[str]]:
    """The cells of every row with an id in the requirements table."""
    found = []
    for line in REQUIREMENTS.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if re.fullmatch(r"(S\d{3}|E|D)-\S+", cells[0]):
            found.append(cells)
    return found


def test_the_lock_pins_every_dependency_by_hash_and_names_no_host():
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    assert {normalised(name) for name in wanted} <= set(locked())
    blocks = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(re.findall(r"^\S+==", LOCK, flags=re.MULTILINE))
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert (
        re.findall(
            r"https?:|index-url|find-links|trusted-host", re.sub(r"^#.*$", "", LOCK, flags=re.MULTILINE)
        )
        == []
    )


def test_the_build_needs_nothing_that_is_not_locked():
    build = PYPROJECT["build-system"]["requires"]
    assert {normalised(name) for name in build} | {"uv"} <= set(locked())


def test_the_installer_is_cut_from_the_lock_with_its_hashes():
    recipe = (REPOSITORY / "Makefile").read_text()
    program = re.search(r"awk '(/\^\[\^ \]/[^']+)' requirements\.lock", recipe)
    assert program is not None
    done = subprocess.run(
        ["awk", program[1].replace("$$", "$"), "requirements.lock"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"uv=={locked()['uv']} ")
    assert re.findall(r"^[a-z0-9]", done.stdout, flags=re.MULTILINE) == ["u"]
    assert "--hash=sha256:" in done.stdout


@pytest.mark.parametrize("target", ["setup", "run", "test", "check", "format", "bench", "clean"])
def test_make_knows_each_door(target):
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused_with_the_remedy(tmp_path):
    old = tmp_path / "python3"
    old.write_text(
        '#!/bin/sh\nexec "$REAL_PYTHON" -c "import sys; sys.version_info = (3, 9, 0); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"REAL_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs Python >= 3.11, this is 3.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_goes_through_the_same_door():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "make check" in script.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_every_requirement_has_one_row_with_a_place_a_proof_and_a_status():
    cells = rows()
    assert len(cells) > 300
    ids = [row[0] for row in cells]
    assert sorted({name for name in ids if ids.count(name) > 1}) == []
    assert [row[0] for row in cells if len(row) != 5 or not all(row)] == []
    assert [(row[0], row[4]) for row in cells if not STATUSES.fullmatch(row[4])] == []


def test_what_is_called_done_exists():
    """A path in backticks is a file or directory here; a place `file.py: name` has that name in the file."""
    missing = []
    for name, _, *places, status in rows():
        if status != "done":
            continue
        for path, symbol in re.findall(r"`([\w./-]+\.\w+|[\w./-]+/)(?:: ([\w.]+))?`", " ".join(places)):
            file = REPOSITORY / path
            if not file.exists() or (symbol and symbol.rpartition(".")[2] not in file.read_text()):
                missing.append((name, path, symbol))
    assert missing == []


def coverage_report(lines: tuple[int, int], branches: tuple[int, int], missing: int = 0) -> dict:
    totals = {
        "covered_lines": lines[0],
        "num_statements": lines[1],
        "covered_branches": branches[0],
        "num_branches": branches[1],
    }
    summary = {"missing_lines": missing, "missing_branches": 0}
    return {
        "totals": totals,
        "files": {"p/critical.py": {"summary": summary}, "p/other.py": {"summary": summary}},
    }


LIMITS = {"line_percent_min": 95, "branch_percent_min": 85, "whole": ["p/crit*.py"]}


def test_the_gate_lets_just_enough_coverage_pass():
    assert shortfalls(coverage_report((95, 100), (85, 100)), LIMITS) == []


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (coverage_report((9499, 10000), (100, 100)), "lines"),
        (coverage_report((1000, 1000), (84, 100)), "branches"),
        (coverage_report((1000, 1000), (100, 100), missing=1), "p/critical.py"),
    ],
)
def test_the_gate_names_each_shortfall_alone(measured, word):
    (sentence,) = shortfalls(measured, LIMITS)
    assert word in sentence


def test_a_benchmark_prints_one_line_with_what_its_figures_depend_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "is_recording", lambda: True)
    report.emit("sample", {"steps_per_s": 12.5}, lanes=4)
    printed = capsys.readouterr().out
    line = json.loads(printed)
    assert printed.count("\n") == 1
    assert (line["name"], line["figures"], line["context"]) == ("sample", {"steps_per_s": 12.5}, {"lanes": 4})
    assert line["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert line["machine"]["cpu"]
    assert line["versions"]["torch"] == locked()["torch"]
    assert (tmp_path / "results" / "sample.jsonl").read_text() == printed


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        report.emit("sample", {"steps_per_s": float("nan")})


def test_an_unknown_benchmark_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        benches.main(["no_such_bench"])
    assert ended.value.code == 2
    assert "no_such_bench" in capsys.readouterr().err


def test_one_failing_benchmark_fails_the_run_but_not_the_others(tmp_path, monkeypatch, capfd):
    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a_breaks.py").write_text("raise SystemExit(3)")
    (package / "b_works.py").write_text("print('b ran')")
    monkeypatch.setattr(benches, "HERE", package)
    assert benches.main([]) == 1
    output = capfd.readouterr()
    assert output.out == "b ran\n"
    assert "bench.a_breaks ended with status 3" in output.err

"""The laws of the packages that no import order can express, read from the source.

`esper_simic` computes and `supervisor` acts: what is out of bounds for the first is a table here, with its honest
exceptions and their reasons. The order of the rooms itself is kept by import-linter (`make layers`).
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LINES_MAX = 500
GENERATED = "leyline/generated/"

ACTING_MODULES = frozenset(
    "asyncio concurrent ctypes fcntl http logging mmap multiprocessing os pickle psutil queue random secrets select "
    "shutil signal socket sqlite3 ssl structlog subprocess tempfile threading time urllib uuid zmq".split()
)
"""Ways to the outside world, to clocks, and to chance that nobody handed in."""

ACTING_CALLS = frozenset(
    "breakpoint eval exec input open print datetime.date.today datetime.datetime.now datetime.datetime.today "
    "datetime.datetime.utcnow numpy.load numpy.save numpy.savez torch.load torch.manual_seed torch.save torch.seed "
    "torch.set_rng_state torch.random.manual_seed torch.random.seed".split()
)
FILE_METHODS = frozenset("mkdir read_bytes read_text rename touch unlink write_bytes write_text".split())

NEEDS_GENERATOR = frozenset(
    "torch.bernoulli torch.multinomial torch.normal torch.poisson torch.rand torch.randint torch.randn "
    "torch.randperm".split()
)
NEEDS_GENERATOR_METHODS = frozenset(
    "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_".split()
)
NEVER_RANDOM = frozenset(
    "torch.rand_like torch.randn_like torch.randint_like torch.nn.Dropout torch.nn.functional.dropout "
    "torch.dropout".split()
)
"""These draw from torch's global generator and take no other."""

CONSTANT_INITIALISERS = frozenset("constant_ dirac_ eye_ ones_ zeros_".split())
NUMPY_RANDOM_ALLOWED = frozenset("BitGenerator Generator PCG64 Philox SeedSequence".split())

EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "esper_simic/fingerprint.py",
        "os",
    ): "reads the switches that torch itself reads from its process's environment",
    (
        "esper_simic/worlds/blueprint_table.py",
        "?.read_bytes",
    ): "recorded outcomes are a world's data, as samples are a task's: read once, before its first step",
}
"""(file, what) -> why it is honest. A line that is no longer needed fails the test below."""

BRINGS_WHEN_ASKED: dict[str, str] = {
    "esper_simic/growing_host/tasks/": "a task's loader alone needs its library, once, before the first step",
}
"""Where a function of `esper_simic` may import, and why."""

GUESSING_CALLS = frozenset("locals globals vars hash".split())
"""Whether a value exists is a type's question (None), and `hash` of a text is another one in every process."""

GROWTH = ("esper_simic/growing_host", "esper_simic/rewards")

BROAD_EXCEPT_ALLOWED = ("supervisor/roles/", "supervisor/run.py", "supervisor/cli.py")
"""Where a process has its main: there one handler may catch everything, to record it, and must re-raise."""


def package_files(package: str) -> list[Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    return [file for file in files if GENERATED not in file.as_posix()]


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, local name and full dotted name of everything imported anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                yield node.lineno, local, alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Full name of a call's function with its import resolved; `?.name` for a method of some value."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, names) if isinstance(node.value, ast.Name | ast.Attribute) else "?"
        root = inner.partition(".")[0]
        known = root in {full.partition(".")[0] for full in names.values()}
        return f"{inner}.{node.attr}" if known else f"?.{node.attr}"
    return "?"


def acts(source: str) -> list[tuple[int, str]]:
    """Line and name of everything in a source of `esper_simic` that acts instead of computing."""
    tree = ast.parse(source)
    imported = list(imports(tree))
    found = [
        (line, full.partition(".")[0])
        for line, _, full in imported
        if full.partition(".")[0] in ACTING_MODULES
    ]
    names = {local: full for _, local, full in imported}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.extend((node.lineno, name) for name in call_violations(node, dotted(node.func, names)))
    return sorted(found)


def call_violations(call: ast.Call, name: str) -> Iterator[str]:
    method = name.removeprefix("?.") if name.startswith("?.") else ""
    seeded = any(keyword.arg == "generator" for keyword in call.keywords)
    draws = name in NEEDS_GENERATOR or method in NEEDS_GENERATOR_METHODS
    initialises = name.startswith("torch.nn.init.") and name.rpartition(".")[2] not in CONSTANT_INITIALISERS
    if name in ACTING_CALLS | NEVER_RANDOM or method in FILE_METHODS:
        yield name
    elif (draws or initialises) and not seeded:
        yield f"{name} without a generator"
    elif name.startswith("numpy.random."):
        leaf = name.removeprefix("numpy.random.")
        if leaf not in NUMPY_RANDOM_ALLOWED and not (leaf == "default_rng" and call.args):
            yield name


def broad_handlers(source: str) -> list[tuple[int, str]]:
    """Line of each handler that catches everything, and what it does with it.

    `undoes`: `except BaseException` that takes something back and whose last statement is a bare `raise`; nothing is
    handled there, so it is allowed anywhere. `raises`: it raises again after handling. `swallows`: it does not.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or _names_everything(node.type)):
            undoes = (
                _is_bare_raise(node.body[-1])
                and isinstance(node.type, ast.Name)
                and node.type.id == "BaseException"
            )
            raises = any(_is_bare_raise(part) for part in ast.walk(node))
            found.append((node.lineno, "undoes" if undoes else "raises" if raises else "swallows"))
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func, {}).endswith("suppress")
            and any(map(_names_everything, node.args))
        ):
            found.append((node.lineno, "swallows"))
    return sorted(found)


def _is_bare_raise(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and node.exc is None


def _names_everything(node: ast.expr) -> bool:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(isinstance(part, ast.Name) and part.id in {"Exception", "BaseException"} for part in parts)


def settings() -> dict[str, Any]:
    tool: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    return tool


def test_esper_simic_computes_and_does_not_act():
    files = package_files("esper_simic")
    assert files
    violations, used = [], set()
    for file in files:
        for line, what in acts(file.read_text()):
            key = (relative(file), what)
            if key in EXCEPTIONS:
                used.add(key)
            else:
                violations.append(f"{relative(file)}:{line}: {what}")
    assert violations == []
    assert set(EXCEPTIONS) - used == set(), "exceptions that nothing needs any more"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import time", "time"),
        ("def f():\n    from os import path", "os"),
        ("import concurrent.futures", "concurrent"),
        ("print(1)", "print"),
        ("def f(p):\n    with open(p) as g: pass", "open"),
        ("p.read_text()", "?.read_text"),
        ("f(x).write_bytes(b'')", "?.write_bytes"),
        ("from datetime import datetime\ndatetime.now()", "datetime.datetime.now"),
        ("import datetime as d\nd.datetime.now(d.UTC)", "datetime.datetime.now"),
        ("import torch\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("import torch\ntorch.randn(3)", "torch.randn without a generator"),
        ("from torch import rand\nrand(3)", "torch.rand without a generator"),
        ("from torch import nn\nnn.init.orthogonal_(w)", "torch.nn.init.orthogonal_ without a generator"),
        ("import torch.nn.functional as F\nF.dropout(x)", "torch.nn.functional.dropout"),
        ("x.uniform_(0, 1)", "?.uniform_ without a generator"),
        ("x.exp().multinomial(1)", "?.multinomial without a generator"),
        ("import numpy as np\nnp.random.rand(3)", "numpy.random.rand"),
        ("import numpy as np\nnp.random.default_rng()", "numpy.random.default_rng"),
        ("from numpy.random import default_rng\ndefault_rng()", "numpy.random.default_rng"),
    ],
)
def test_the_check_sees_what_acts(source, what):
    assert [name for _, name in acts(source)] == [what]


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.random.default_rng(key).random(3)",
        "import numpy as np\nnp.random.Generator(np.random.Philox(key=1))",
        "import torch\ntorch.randn(3, generator=g)",
        "from torch import nn\nnn.init.zeros_(w)\nnn.init.orthogonal_(w, generator=g)",
        "rng.normal(0, 1)\nrng.multinomial_counts()",
        "from datetime import timedelta\ntimedelta(1)",
    ],
)
def test_the_check_lets_honest_code_pass(source):
    assert acts(source) == []


@pytest.mark.parametrize("package", ["esper_simic", "supervisor"])
def test_packages_have_no_assert(package):
    found = [
        f"{relative(file)}:{node.lineno}"
        for file in package_files(package)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize("package", ["esper_simic", "supervisor"])
def test_only_the_main_of_a_process_catches_everything_and_it_raises_again(package):
    problems = []
    for file in package_files(package):
        handlers = [(line, does) for line, does in broad_handlers(file.read_text()) if does != "undoes"]
        allowed = relative(file).startswith(BROAD_EXCEPT_ALLOWED)
        problems += [
            f"{relative(file)}:{line}" for line, does in handlers if not (allowed and does == "raises")
        ]
        if len(handlers) > 1:
            problems.append(f"{relative(file)}: {len(handlers)} handlers that catch everything")
    assert problems == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try: f()\nexcept: pass", [(2, "swallows")]),
        ("try: f()\nexcept Exception as e:\n    log(e)", [(2, "swallows")]),
        ("try: f()\nexcept Exception:\n    record()\n    raise", [(2, "raises")]),
        ("try: f()\nexcept (KeyError, BaseException):\n    g()\n    raise", [(2, "raises")]),
        ("try: f()\nexcept BaseException:\n    close()\n    raise", [(2, "undoes")]),
        ("try: f()\nexcept BaseException:\n    if g(): raise\n    close()", [(2, "raises")]),
        ("with contextlib.suppress(Exception): f()", [(1, "swallows")]),
        ("try: f()\nexcept OSError: g()", []),
    ],
)
def test_the_check_sees_broad_handlers(source, expected):
    assert broad_handlers(source) == expected


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every function and method of a file, those within others too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_within(source: str) -> list[int]:
    """Lines of the imports that are made whenever some function runs."""
    parts = (part for function in functions(ast.parse(source)) for part in ast.walk(function))
    return sorted({part.lineno for part in parts if isinstance(part, ast.Import | ast.ImportFrom)})


def calls_of(source: str, names: frozenset[str]) -> list[tuple[int, str]]:
    """Line and name of every call of one of these built-in functions."""
    return sorted(
        (node.lineno, node.func.id)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    )


def choices_within_choices(source: str) -> list[int]:
    """Lines of conditional expressions with another one inside: nobody reads these right at first."""
    choices = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.IfExp))
    return sorted(
        {node.lineno for node in choices if any(isinstance(part, ast.IfExp) for part in inner(node))}
    )


def inner(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node."""
    return (part for child in ast.iter_child_nodes(node) for part in ast.walk(child))


def slots_written_down(source: str) -> list[int]:
    """Lines in which code, not a text about it, names a slot or gives an action's slot a number."""
    tree = ast.parse(source)
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if re.search(r"\br\d+c\d+\b", node.value):
                found.append(node.lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            indices = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
            names = [part.id for index in indices for part in ast.walk(index) if isinstance(part, ast.Name)]
            found += [node.lineno] * ("SLOT" in names)
    return sorted(found)


def test_no_function_of_esper_simic_imports():
    """The traps: imports inside the training loop and inside validation, paid for in every pass."""
    found, used = [], set()
    for file in package_files("esper_simic"):
        lines = imports_within(file.read_text())
        allowed = {place for place in BRINGS_WHEN_ASKED if relative(file).startswith(place)}
        used |= allowed if lines else set()
        found += [f"{relative(file)}:{line}" for line in lines if not allowed]
    assert found == []
    assert set(BRINGS_WHEN_ASKED) - used == set(), "exceptions that nothing needs any more"


@pytest.mark.parametrize("package", ["esper_simic", "supervisor"])
def test_no_code_guesses_what_exists(package):
    """The trap: `"reward_components" in locals()`."""
    found = {relative(file): calls_of(file.read_text(), GUESSING_CALLS) for file in package_files(package)}
    assert {file: calls for file, calls in found.items() if calls} == {}


@pytest.mark.parametrize("package", ["esper_simic", "supervisor"])
def test_no_choice_hides_in_another(package):
    """The trap: `a if b else c if d else e`, and its relatives."""
    found = {relative(file): choices_within_choices(file.read_text()) for file in package_files(package)}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize("package", GROWTH)
def test_no_slot_is_written_into_the_code_of_growth(package):
    """The trap: a controller that acted on slot 0, whatever it had chosen. Slots are the configuration's."""
    found = {relative(file): slots_written_down(file.read_text()) for file in package_files(package)}
    assert len(found) > 5
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize("package", GROWTH)
def test_growth_runs_on_the_one_stream_of_its_caller_and_scales_no_gradient(package):
    """What is made on a side stream must be recorded there, and a scaler belongs to one host: there is neither."""
    words = re.compile(r"\b(\w*[Ss]tream\(|record_stream|GradScaler|autocast)")
    found = {relative(file): words.findall(file.read_text()) for file in package_files(package)}
    assert {file: said for file, said in found.items() if said} == {}


def test_whoever_makes_hosts_tells_them_the_learners_gamma():
    """Shaping with another gamma would change which policy is best; the default is for Gymnasium's `make` alone."""
    made = {"GrowingHosts", "GrowingHostVectorEnv"}
    given = [
        (relative(file), node.lineno, [word.value for word in node.keywords if word.arg == "gamma"])
        for package in ("esper_simic", "supervisor")
        for file in package_files(package)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in made
    ]
    assert len(given) >= 4
    assert [where for *where, gamma in given if not gamma or isinstance(gamma[0], ast.Constant)] == []


def test_the_checks_of_structure_see_what_they_are_for():
    assert choices_within_choices(
        "a if b else c\nx = 1 if (2 if y else z) else 3\na if b else f(c if d else e)"
    ) == [2, 3]
    assert imports_within("import a\ndef f():\n    def g():\n        from b import c\n    import d") == [4, 5]
    assert calls_of("if 'x' in locals(): y = hash(t)\nz.hash()", GUESSING_CALLS) == [
        (1, "hash"),
        (1, "locals"),
    ]
    assert slots_written_down('"""r0c0"""\nf("r0c1")\na[:, SLOT] = 0\na[SLOT] = b\na[:, OP] = 1') == [2, 3]


@pytest.mark.parametrize("package", ["esper_simic", "supervisor", "bench"])
def test_files_stay_short_enough_to_read(package):
    lengths = {relative(file): len(file.read_text().splitlines()) for file in package_files(package)}
    assert {file: length for file, length in lengths.items() if length > LINES_MAX} == {}


def test_rooms_above_the_torch_line_import_without_torch():
    torch_rooms = tuple(settings()["simic"]["layers"]["torch_rooms"])
    modules = [
        name
        for package in ("esper_simic", "supervisor")
        for name in map(module_name, package_files(package))
        if not any(name == room or name.startswith(f"{room}.") for room in torch_rooms)
    ]
    assert modules
    script = (
        "import importlib, json, sys\n"
        "brought = []\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        brought.append(name)\n"
        "        break\n"
        "print(json.dumps(brought))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(modules)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [], "importing this module brings torch into the process"

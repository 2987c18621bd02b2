"""`simic-supervisor try-blueprints`: grow blueprints into hosts and write down what came of it."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import shlex
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final

import typer

from esper_simic import blueprint_outcomes
from esper_simic.config import TrainerConfig
from esper_simic.config_environment import HOST_NAMES
from supervisor import files
from supervisor.cli_common import FAILED, USAGE, fail

HOSTS: Final = (
    "mnist1d/series",
    "wine/mlp",
    "breast_cancer/mlp",
    "digits/rescue",
    "digits/minimal",
    "digits/augment",
    "digits/highres",
    "digits32/deep_impaired",
    "characters/transformer",
    "synthetic:1x8x8:4:1024/rescue",
    "synthetic:1x8x8:10:1024/minimal",
    "synthetic:1x8x8:4:1024/augment",
    "synthetic:2x1x32:6:1024/series",
    "synthetic:1x1x64:4:1024/series",
    "synthetic:20x1x1:5:1024/mlp",
    "synthetic:30x1x1:3:512/mlp",
)
"""Tasks and hosts that are tried where none is named."""

VERSIONED: Final = ("simic", "torch", "numpy", "scikit-learn")


def try_blueprints(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write what came of it.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host", metavar="TASK/HOST", help="A host to try; repeatable. Default: sixteen of them."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=64, help="Trials of each blueprint in each slot.")] = 8,
    epochs: Annotated[int, typer.Option(min=4, help="Epochs of each host.")] = 20,
    training_epochs: Annotated[
        int, typer.Option(min=1, help="Epochs a seed trains before it is blended in.")
    ] = 3,
    germinate_at: Annotated[int, typer.Option(min=0, help="Epoch after which seeds germinate.")] = 4,
    behind_pools: Annotated[
        bool, typer.Option("--behind-pools", help="Try slots behind pools, too.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the computation.")] = 1,
) -> None:
    """Grow every blueprint in every slot of some hosts, each beside a twin without it, and write the outcomes down.

    Karn's controller learns from such a file: environment.kwargs.table of the preset karn names it.
    """
    pairs = [_pair(text) for text in hosts or HOSTS]
    settings: dict[str, int | float | str] = {"max_epochs": epochs, "training_epochs_min": training_epochs}
    with warnings.catch_warnings():
        # torch-geometric compiles its helpers with a deprecated call while it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        from supervisor.roles.trials import Trials, grow, task_digests  # brings torch

    trials = Trials(
        hosts=pairs,
        seeds=range(seeds),
        germinated_at=germinate_at,
        settings=settings,
        behind_pools=behind_pools,
        gamma=TrainerConfig().gamma,
    )
    digests = task_digests(task for task, _ in pairs)
    outcomes, begun = [], time.monotonic()
    for one in grow(trials, threads, lambda: None):
        outcomes.append(one)
        place = one.place
        print(f"{place.task} {place.host} {place.slot}: {time.monotonic() - begun:.0f} s", flush=True)
    head = blueprint_outcomes.OutcomesHead(
        format=blueprint_outcomes.FORMAT,
        command=shlex.join(["simic-supervisor", *sys.argv[1:]]),
        versions={name: metadata.version(name) for name in VERSIONED},
        germinated_at=germinate_at,
        environment=settings,
        tasks=digests,
    )
    data = blueprint_outcomes.encode(head, outcomes)
    try:
        files.write_atomically(out, data)
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}; name another place with --out", FAILED)
    print(f"{out}: {len(outcomes)} places, {len(data):,} bytes")


def _pair(text: str) -> tuple[str, str]:
    task, separator, host = text.rpartition("/")
    if not separator or not task or host not in HOST_NAMES:
        fail(f"--host takes TASK/HOST with one of {', '.join(HOST_NAMES)}, not {text!r}", USAGE)
    return task, host

"""Makes the journal that is kept for ever anew, or says what it folds to here.

    python -m tests.replay.record            makes the run anew: only when its format has to hold more than before
    python -m tests.replay.record --digests  adds what it folds to under this machine's fingerprint to `digests.json`

The run is a tiny one with everything in it that a learner's journal can hold after a day of bad luck: episodes that
end, unrolls that came too late, checkpoints beside the training, and a learner that was killed and came back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from esper_simic.events import CheckpointStaged, LearnerRecovered, LearnerStepped
from esper_simic.fingerprint import fingerprint
from supervisor.clock import ManualClock
from supervisor.journal import Journal, read
from supervisor.journal.writer import LOCK_NAME
from supervisor.roles.fold import LearnerFold, config_of_journal
from tests.system.driver import DEADLINE_S, Running, is_ready, output_path, running

HERE = Path(__file__).parent
RUN = HERE / "run"
DIGESTS = HERE / "digests.json"
OWNER = "learner-0"
UPDATES = 24
BYTES_MAX = 800_000

SETTINGS: dict[str, Any] = {
    "environment__environments_per_actor": 2,
    "environment__max_epochs": 8,
    "environment__train_batches": 1,
    "experience_buffer__capacity": 32,
    "experience_buffer__min_experiences": 8,
    "simic_trainer__batch_size": 8,
    "simic_trainer__unroll_length": 5,
    "simic_trainer__hidden_size": 16,
    "simic_trainer__graph_layers": 1,
    "simic_trainer__max_policy_lag": 3,
    "simic_trainer__digest_every_steps": 5,
    "supervisor__num_actors": 2,
    "supervisor__max_updates": UPDATES,
    "supervisor__checkpoint_interval_steps": 6,
    "supervisor__keep_last": 20,
    "supervisor__keep_best": 0,
    "supervisor__evaluation_episodes": 2,
}

WANTED = {
    "ExperienceAdmitted": 20,
    "ExperienceRefused": 1,
    "LearnerStepped": UPDATES,
    "CheckpointStaged": 2,
    "CheckpointSaved": 2,
    "LearnerRecovered": 1,
}
"""What it must hold, at least."""


class Computed(NamedTuple):
    """What a journal folds to: digests of the parameters by step, and of the whole state by position."""

    steps: dict[str, str]
    states: dict[str, str]


def compute(run_dir: Path) -> Computed:
    """Fold a run's journal here."""
    journal = run_dir / "journal" / OWNER
    config = config_of_journal(journal)
    torch.set_num_threads(config.supervisor.learner_threads)
    fold = LearnerFold(config, journal, run_dir / "checkpoints")
    steps, states = {}, {}
    for record in read(journal):
        folded = fold.take(record)
        if folded.report is not None:
            steps[str(folded.report.step)] = folded.report.digest
        if folded.state_digest is not None:
            states[str(record.position)] = folded.state_digest
    return Computed(steps, states)


def recorded(run_dir: Path) -> Computed:
    """What the learner itself has written down."""
    steps, states = {}, {}
    for record in read(run_dir / "journal" / OWNER):
        match record.kind:
            case "LearnerStepped":
                event = record.header_as(LearnerStepped)
                steps[str(event.step)] = event.digest
                if event.state_digest is not None:
                    states[str(record.position)] = event.state_digest
            case "CheckpointStaged":
                states[str(record.position)] = record.header_as(CheckpointStaged).state_digest
            case "LearnerRecovered":
                states[str(record.position)] = record.header_as(LearnerRecovered).state_digest
            case _:
                pass
    return Computed(steps, states)


def known() -> list[dict[str, Any]]:
    """The fingerprints under which it was folded, each with what it came to."""
    found: list[dict[str, Any]] = json.loads(DIGESTS.read_text())
    return found


def add_digests() -> None:
    """Note what the kept journal folds to under this fingerprint."""
    computed = compute(RUN)
    entry = {"fingerprint": fingerprint(), **computed._asdict()}
    others = (
        [one for one in known() if one["fingerprint"] != entry["fingerprint"]] if DIGESTS.exists() else []
    )
    DIGESTS.write_text(json.dumps([*others, entry], indent=1) + "\n")


def make() -> None:
    """Make the run anew, in place of the one that is kept.

    Raises:
        SystemExit: It came out without something that it must hold; once more, then.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        with running(run_dir, **SETTINGS) as run:
            kill_the_learner(run)
            code = run.process.wait(4 * DEADLINE_S)
        if code != 0:
            raise SystemExit(f"the run ended with {code}:\n{output_path(run_dir).read_text('utf-8')}")
        keep(run_dir)


def kill_the_learner(run: Running) -> None:
    """As soon as it has a checkpoint and goes on from it."""
    shot = run.until(lambda shot: shot.learner.step >= 8, "eight updates", 2 * DEADLINE_S)
    (learner,) = [view for view in shot.processes if is_ready(view, "learner")]
    os.kill(learner.pid, signal.SIGKILL)


def keep(run_dir: Path) -> None:
    """Put what is needed of a run here."""
    held = Counter(record.kind for record in read(run_dir / "journal" / OWNER))
    lacking = {kind: held[kind] for kind, count in WANTED.items() if held[kind] < count}
    if lacking:
        raise SystemExit(f"too few of some kinds: {lacking}; run it once more")
    shutil.rmtree(RUN, ignore_errors=True)
    (RUN / "journal" / OWNER).mkdir(parents=True)
    for segment in (run_dir / "journal" / OWNER).glob("*.log"):
        shutil.copy(segment, RUN / "journal" / OWNER)
    without_paths(run_dir)
    every = sorted((run_dir / "checkpoints").iterdir())
    for checkpoint in (every[1], every[-1]):
        shutil.copytree(checkpoint, RUN / "checkpoints" / checkpoint.name)
    size = sum(path.stat().st_size for path in RUN.rglob("*") if path.is_file())
    if size > BYTES_MAX:
        raise SystemExit(f"{size} bytes are too many to keep for ever; at most {BYTES_MAX}")
    DIGESTS.unlink(missing_ok=True)
    print(f"{size} bytes: {dict(held)}")


def without_paths(run_dir: Path) -> None:
    """The supervisor's journal, written again without the names of this machine's directories."""
    source, clock = run_dir / "journal" / "supervisor", ManualClock()
    run_id = str(next(read(source)).header["run_id"])
    target = RUN / "journal" / "supervisor"
    with Journal(target, owner="supervisor", run_id=run_id, clock=clock) as journal:
        for record in read(source):
            clock.set_now(record.time_ns / 1e9)
            text = json.dumps(record.header)
            for path, name in ((run_dir, "run"), (sys.prefix, "environment"), (HERE.parents[1], "source")):
                text = text.replace(str(path), name)
            journal.append(record.kind, json.loads(text), [bytes(frame) for frame in record.frames])
        journal.sync()
    (target / LOCK_NAME).unlink()


def main(arguments: list[str]) -> None:
    """Do what the module's first lines say."""
    if arguments not in ([], ["--digests"]):
        raise SystemExit(__doc__)
    if not arguments:
        make()
    # In a process of its own: what ran before must not have touched this one's number of threads.
    command = [sys.executable, "-c", "from tests.replay import record; record.add_digests()"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(sys.argv[1:])

"""How a learner computes over its lives: chosen once, said, journaled, kept; and what an inexact way is allowed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_simic import execution_cuda
from esper_simic.config import TrainerConfig
from esper_simic.errors import ConfigError, InvariantViolation
from esper_simic.events import FingerprintChanged, LearnerRecovered, LearnerStepped, RunStarted
from esper_simic.execution import CPU, Execution
from esper_simic.execution_cuda import CudaDevice
from esper_simic.fingerprint import fingerprint
from esper_simic.policies.policy import Evaluation
from supervisor import checkpoints
from supervisor.clock import ManualClock, SystemClock
from supervisor.journal import Journal, Record, read
from supervisor.playback import Request, replay
from supervisor.protocol import COMPILING, Progress
from supervisor.roles import way
from supervisor.roles.attempts import Attempts
from supervisor.roles.fold import LearnerFold
from supervisor.roles.recovery import Recovery
from tests.roles.bench import RUN_ID, bench, make_config
from tests.roles.scribe import Scribe
from tests.roles.test_failed_steps import break_updates, fill, not_finite
from tests.roles.test_learner_main import living

H200 = CudaDevice(0, "NVIDIA H200", (9, 0))
PLAIN = Execution.choose("cpu", plain=True)
HALF = dataclasses.replace(CPU, autocast_dtype=torch.bfloat16)
SCALED = dataclasses.replace(CPU, has_loss_scale=True)
COMPILED = dataclasses.replace(CPU, is_compiled=True)


def as_it_is(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    return function


def nudged(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    """Code that adds up in another order: some last bits are others."""

    def fast(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return found._replace(values=found.values * 1.000001) if isinstance(found, Evaluation) else found

    return fast


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_cuda, "devices", lambda: (H200,))


def chosen(scribe: Scribe, **keys: Any) -> str:
    scribe.journal.sync()
    return way.choose(TrainerConfig(**keys), scribe.journal.directory, scribe.checkpoints, 0).device_name


@pytest.mark.usefixtures("gpu")
def test_a_new_run_takes_the_gpu(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.mkdir()
    found = way.choose(TrainerConfig(), journal, tmp_path / "none", 0)
    assert found == Execution.choose("cuda", gpus=(H200,))
    plain = way.choose(TrainerConfig(plain_execution=True), journal, tmp_path / "none", 0)
    assert plain == Execution.choose("cuda", plain=True, gpus=(H200,))
    assert way.choose(TrainerConfig(device="cpu"), journal, tmp_path / "none", 0) == CPU


@pytest.mark.usefixtures("gpu")
def test_a_run_that_began_on_the_cpu_stays_there_unless_the_configuration_names_another_device(
    tmp_path: Path,
) -> None:
    with Scribe(tmp_path / "run", make_config()) as scribe:
        assert chosen(scribe) == "cpu"
        assert chosen(scribe, device="cuda") == "NVIDIA H200"
        scribe.teach(4)
        scribe.checkpoint()
        assert chosen(scribe) == "cpu"
        (path,) = scribe.checkpoints.glob("*/manifest.json")
        path.write_text(path.read_text().replace('"device": "cpu"', '"device": "NVIDIA H200"'))
        assert chosen(scribe) == "NVIDIA H200", "the newest fingerprint counts, not the first"


def test_a_device_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with (
        Scribe(tmp_path / "run", make_config()) as scribe,
        pytest.raises(ConfigError, match="no cuda:7 here"),
    ):
        chosen(scribe, device="cuda:7")


def test_a_journal_without_a_beginning_says_nothing_and_a_damaged_one_is_for_a_person(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with Journal(journal, owner="learner-0", run_id=RUN_ID) as written:
        written.append("Other", {})
        written.append("Other", {})
        written.sync()
    assert way.choose(TrainerConfig(device="auto"), journal, tmp_path / "none", 0) == Execution.choose()
    (segment,) = journal.glob("*.log")
    data = bytearray(segment.read_bytes())
    data[data.index(b"Other") + 1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot go on exactly"):
        way.choose(TrainerConfig(device="auto"), journal, tmp_path / "none", 0)


# -- a life in each way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", [PLAIN, HALF, SCALED, COMPILED], ids=str)
def test_a_run_in_each_way_is_said_recovered_and_replayed(
    execution: Execution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(way, "choose", lambda *_: execution)
    words = fingerprint(execution)
    with living(tmp_path / "run", "simic_trainer.gradient_accumulation=2") as life:
        life.begin()
        assert life.until_ready().execution == str(execution)
        life.actor.hello()
        life.teach(6)
        stopped = life.stop()
        assert life.records()[0].header_as(RunStarted).fingerprint == words
        assert stopped.checkpoint is not None
        assert checkpoints.load(Path(stopped.checkpoint.path))[0].fingerprint == words
        steps = [record.header_as(LearnerStepped) for record in life.records(LearnerStepped)]
        assert len(steps) == 2
        assert ("loss_scale" in steps[-1].metrics) == execution.has_loss_scale
        assert {note for told in life.said(Progress) for note in told.notes} == set()
        compiles = any(told.phase == COMPILING for told in life.said(Progress))
        assert compiles == execution.is_compiled

        shutil.rmtree(life.run_dir / "checkpoints")  # so that the updates are made again
        life.begin()
        life.until_ready()
        life.stop()
        (recovered,) = life.records(LearnerRecovered)
        assert recovered.header_as(LearnerRecovered).steps_redone == 2
        assert recovered.header["is_exact"] is True, "this compiler changes nothing, so digests agree"
        assert life.records(FingerprintChanged) == []
        report = replay(Request(life.run_dir, verify=True), SystemClock())
        assert report.outcome == "equal", report
        assert (report.inexact_way != "") == (not execution.is_exact)
        assert report.fingerprint_differences == {}


def test_a_learner_that_cannot_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        def fast(*args: Any, **kwargs: Any) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("no code today")

        return fast

    monkeypatch.setattr(torch, "compile", refuses)
    monkeypatch.setattr(way, "choose", lambda *_: COMPILED)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_ready()
        life.actor.hello()
        life.teach(6)
        life.stop()
        evaluation, loss = life.said(Progress)[-1].notes
    assert evaluation.startswith("the policy's evaluation cannot be compiled and is run as it is")
    assert loss.startswith("the loss cannot be compiled")
    assert "no code today" in loss


def test_the_devices_memory_counts_with_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Execution, "memory_fraction", lambda _: 0.875)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_ready()
        life.actor.hello()
        life.teach(6)
        life.stop()
        steps = [record.header_as(LearnerStepped) for record in life.records(LearnerStepped)]
    assert all(step.inputs is not None and step.inputs.memory_fraction >= 0.875 for step in steps)


# -- ways that are not exact -------------------------------------------------------------------------------------------


def recovered(run_dir: Path, execution: Execution) -> tuple[Recovery, LearnerFold]:
    """The next life of a learner, up to its recovery."""
    with (
        Journal(run_dir / "journal" / "learner-0", owner="learner-0", run_id=RUN_ID) as journal,
        Attempts(run_dir / "learner-0.attempts") as attempts,
    ):
        life = Recovery(
            run_dir,
            RUN_ID,
            2,
            make_config(),
            journal,
            attempts,
            ManualClock(),
            lambda _: None,
            execution=execution,
        )
        return life, life.run()


def test_an_inexact_way_recovers_to_another_state_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with Scribe(run_dir, make_config()) as scribe:
        scribe.teach(6)
        scribe.journal.sync()
    monkeypatch.setattr(torch, "compile", nudged)
    life, fold = recovered(run_dir, COMPILED)
    assert not life.is_exact
    assert life.divergent_step == 1
    assert fold.learner.steps_done == 2
    last = list(read(run_dir / "journal" / "learner-0"))[-2:]
    assert [record.kind for record in last] == ["FingerprintChanged", "LearnerRecovered"]
    assert last[0].header_as(FingerprintChanged).after == fingerprint(COMPILED)
    assert not last[1].header_as(LearnerRecovered).is_exact


def lived(run_dir: Path) -> tuple[LearnerFold, LearnerFold, list[Record]]:
    """A run with a handful of updates; a fold of it that computes exactly, and one that need not; the records."""
    with bench(run_dir) as held:
        fill(held, [held.actor(0), held.actor(1)], 4)
        records = held.records()
    journal = run_dir / "journal" / "learner-0"
    exact, inexact = (
        LearnerFold(make_config(), journal, run_dir / "none", execution=execution)
        for execution in (CPU, COMPILED)
    )
    return exact, inexact, records


def test_where_bits_are_not_promised_an_update_that_fails_now_ends_no_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", as_it_is)
    exact, inexact, records = lived(tmp_path / "run")
    for fold in (exact, inexact):
        break_updates(fold.learner, not_finite, after=1)
    made = [folded for folded in map(inexact.take, records) if isinstance(folded.event, LearnerStepped)]
    failures = [folded.report.failure for folded in made if folded.report is not None]
    assert failures[1].startswith("not finite")
    assert [bool(failure) for failure in failures].count(True) == 1
    assert len(failures) > 2
    with pytest.raises(InvariantViolation, match="was made once, and fails here"):
        for record in records:
            exact.take(record)


def test_where_bits_are_not_promised_an_update_that_lacks_experience_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", as_it_is)
    exact, inexact, records = lived(tmp_path / "run")
    first = next(record.position for record in records if record.kind == "ExperienceAdmitted")
    fewer = [record for record in records if record.position != first]
    steps = [folded for folded in map(inexact.take, fewer) if isinstance(folded.event, LearnerStepped)]
    assert any(folded.report is None for folded in steps)
    assert inexact.learner.steps_done == len(steps)
    with pytest.raises(InvariantViolation, match="without enough experience"):
        for record in fewer:
            exact.take(record)

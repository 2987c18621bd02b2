"""One tiny run from its first second to the table, and all that it leaves: for people, for tools, and for a replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.comparison import mean_interval
from esper_simic.config import Config
from esper_simic.evaluation import evaluate, held_out_seeds
from esper_simic.events import CheckpointSaved, CheckpointStaged, LearnerStepped, RunStarted
from esper_simic.learner import Learner
from esper_simic.learner_state import digest
from supervisor import checkpoints
from supervisor.config_file import config_of
from supervisor.events import FIXED, LEARNED, PolicyEvaluated
from supervisor.journal import Record, read
from supervisor.roles.evaluate import load_policy
from supervisor.roles.fold import LearnerFold
from supervisor.vitals import Snapshot
from tests.system.driver import left_after, output_path, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

POLICIES = (
    LEARNED,
    FIXED,
    *("heuristic", "patient", "fixed-schedule", "farm", "random", "never-grow"),
)
MAX_STEPS = 400
EPISODES = 4


class Tiny(NamedTuple):
    run_dir: Path
    code: int
    output: str
    left: list[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    run_dir = tmp_path_factory.mktemp("tiny") / "run"
    with running(run_dir, supervisor__max_steps=MAX_STEPS, simic_trainer__digest_every_steps=3) as run:
        code = run.process.wait(200)
        left = [str(process) for process in left_after(run.process.pid)]
    return Tiny(run_dir, code, output_path(run_dir).read_text("utf-8"), left)


def records(tiny: Tiny, owner: str, kind: str = "") -> list[Record]:
    return [record for record in read(tiny.run_dir / "journal" / owner) if kind in ("", record.kind)]


# -- for people --------------------------------------------------------------------------------------------------------


def test_it_ends_well_and_leaves_no_process(tiny: Tiny) -> None:
    assert tiny.code == 0, tiny.output
    assert tiny.left == []


def test_its_table_holds_all_policies_with_return_accuracy_and_parameters_together(tiny: Tiny) -> None:
    rows = [line for line in tiny.output.splitlines() if line.startswith("| ")]
    header, *body = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert header == ["policy", "return", "learned minus it", "host accuracy %", "parameters added"]
    assert [row[0] for row in body] == list(POLICIES)
    for name, earned, ahead, *others in body:
        assert (earned == "-") == (name == FIXED), "nobody acts in a fixed network"
        assert (ahead == "-") == (name in (FIXED, LEARNED))
        shown = [cell for cell in (earned, ahead) if cell != "-"]
        assert all("[" in cell and "]" in cell for cell in (*shown, *others)), (
            "every figure with its interval"
        )
    assert f"{EPISODES} held-out episodes each" in tiny.output


def test_the_table_tells_what_the_journal_holds(tiny: Tiny) -> None:
    events = [r.header_as(PolicyEvaluated) for r in records(tiny, "supervisor", "PolicyEvaluated")]
    measured = {event.policy: event for event in events}
    assert set(measured) == set(POLICIES)
    for name, event in measured.items():
        assert len(event.accuracies) == len(event.parameters) == EPISODES
        assert len(event.returns) == (0 if name == FIXED else EPISODES)
        (row,) = [line for line in tiny.output.splitlines() if line.startswith(f"| {name} ")]
        interval = mean_interval(event.accuracies)
        assert f"{interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]" in row
        if name != FIXED:  # a table made of the journal has the figures that the evaluator found
            middle, low, high = (event.summary[f"return_iqm{end}"] for end in ("", "_low", "_high"))
            assert f"{middle:.2f} [{low:.2f}, {high:.2f}]" in row
    assert set(measured["never-grow"].parameters) == {0.0}
    assert measured[FIXED].parameters == measured[LEARNED].parameters


def test_the_same_directory_is_reported_again_and_not_run_again(tiny: Tiny) -> None:
    count = len(records(tiny, "supervisor"))
    said = say("run", "--run-dir", tiny.run_dir)
    assert said.code == 0, said.err
    assert all(f"| {name} " in said.out for name in POLICIES)
    assert len(records(tiny, "supervisor")) == count


def test_status_afterwards_comes_from_the_files_alone(tiny: Tiny) -> None:
    assert not (tiny.run_dir / "supervisor.json").exists()
    said = say("status", tiny.run_dir, "--json")
    assert said.code == 3, said.err
    shown = said.json()
    assert shown["schema"] == 1
    snapshot = msgspec.convert(shown, Snapshot)
    assert snapshot.state == "finished"
    last = records(tiny, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert snapshot.learner.step == last.step >= 10
    assert snapshot.environment.steps >= MAX_STEPS
    assert {(view.role, view.index, view.pid, view.memory_bytes) for view in snapshot.processes} == {
        ("learner", 0, 0, 0),
        ("actor", 0, 0, 0),
        ("evaluate", 0, 0, 0),
    }
    assert sorted(snapshot.evaluated) == sorted(POLICIES)
    page = say("status", tiny.run_dir)
    assert page.code == 3
    assert "finished" in page.out
    assert say("is-healthy", tiny.run_dir).code == 3


# -- for tools ---------------------------------------------------------------------------------------------------------


def test_the_run_directory_is_as_it_is_described(tiny: Tiny) -> None:
    assert {path.name for path in (tiny.run_dir / "journal").iterdir()} == {"supervisor", "learner-0"}
    assert {path.name for path in (tiny.run_dir / "logs").glob("*.log")} == {
        "learner-0.log",
        "actor-0.log",
        "evaluate-0.log",
        "forkserver.log",
    }
    (checkpoint,) = (tiny.run_dir / "checkpoints").iterdir()
    assert {path.name for path in checkpoint.iterdir()} == {
        "manifest.json",
        "state.safetensors",
        "numbers.json",
    }
    for name in ("learner-0", "actor-0", "evaluate-0"):
        text = (tiny.run_dir / "logs" / f"{name}.log").read_text("utf-8")
        assert "Traceback" not in text, text


def test_log_verify_finds_both_journals_sound(tiny: Tiny) -> None:
    said = say("log", "verify", tiny.run_dir)
    assert said.code == 0, said.out
    assert said.out.count(": sound") == 2
    assert "torn" not in said.out


def test_log_cat_prints_json_lines(tiny: Tiny) -> None:
    said = say("log", "cat", tiny.run_dir, "--owner", "learner-0")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["position"] for line in lines] == list(range(len(lines)))
    assert lines[0]["kind"] == "RunStarted"
    assert lines[-1]["kind"] == "CheckpointSaved"
    admitted = [line for line in lines if line["kind"] == "ExperienceAdmitted"]
    assert all(len(line["frames"]) == 15 and sum(line["frames"]) > 1000 for line in admitted)
    only = say("log", "cat", tiny.run_dir, "--kind", "PolicyEvaluated", "--limit", "2")
    assert [json.loads(line)["kind"] for line in only.out.splitlines()] == ["PolicyEvaluated"] * 2


def test_log_ls_names_segments_and_what_they_hold(tiny: Tiny) -> None:
    said = say("log", "ls", tiny.run_dir, "--owner", "learner-0")
    assert said.code == 0, said.err
    (line,) = said.out.splitlines()
    assert line.startswith("00000000000000000000.log")
    assert f"{len(records(tiny, 'learner-0'))} records" in line
    assert f"LearnerStepped {len(records(tiny, 'learner-0', 'LearnerStepped'))}" in line


def test_tensorboard_gets_known_tags_at_growing_environment_steps(tiny: Tiny) -> None:
    scalars = EventAccumulator(str(tiny.run_dir / "tensorboard")).Reload()
    tags = set(scalars.Tags()["scalars"])
    assert {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/learning_rate",
        "charts/SPS",
        "losses/value_loss",
        "losses/policy_loss",
        "losses/entropy",
        "losses/approx_kl",
        "losses/explained_variance",
    } <= tags
    for tag in tags:
        steps = [point.step for point in scalars.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    last = records(tiny, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert scalars.Scalars("losses/value_loss")[-1].step == last.environment_steps, (
        "the last report is shown too"
    )


# -- for a replay ------------------------------------------------------------------------------------------------------


class Replayed(NamedTuple):
    learner: Learner
    steps: int
    state_digests: int


@pytest.fixture(scope="module")
def configuration(tiny: Tiny) -> Config:
    return config_of(records(tiny, "learner-0")[0].header_as(RunStarted).config)


@pytest.fixture(scope="module")
def replayed(tiny: Tiny, configuration: Config) -> Replayed:
    """Fold the learner's journal, in order, into a fresh learner; every step must come to the journaled bits."""
    assert torch.get_num_threads() == configuration.supervisor.learner_threads
    fold = LearnerFold(configuration, tiny.run_dir / "journal" / "learner-0", tiny.run_dir / "checkpoints")
    steps = state_digests = 0
    for record in records(tiny, "learner-0"):
        folded = fold.take(record)
        if isinstance(folded.event, CheckpointStaged):
            assert folded.state_digest == folded.event.state_digest
        if isinstance(folded.event, LearnerStepped):
            made, journaled = folded.report, folded.event
            assert made is not None
            assert (made.step, made.digest) == (journaled.step, journaled.digest)
            assert made.state_digest == journaled.state_digest, made.step
            assert made.environment_steps == journaled.environment_steps
            assert made.metrics == journaled.metrics
            steps, state_digests = steps + 1, state_digests + (made.state_digest is not None)
    return Replayed(fold.learner, steps, state_digests)


def test_the_journal_alone_gives_every_digest_again(replayed: Replayed) -> None:
    assert replayed.steps >= 10
    assert replayed.state_digests == replayed.steps // 3


def test_the_checkpoint_is_the_fold_of_the_journal(
    tiny: Tiny, configuration: Config, replayed: Replayed
) -> None:
    staged, record = records(tiny, "learner-0")[-2:]
    saved = record.header_as(CheckpointSaved)
    directory = tiny.run_dir / "checkpoints" / saved.directory
    manifest, files = checkpoints.load(directory)
    assert manifest.journal_position == saved.staged_at == staged.position
    assert saved.files == {name: file.sha256 for name, file in manifest.files.items()}
    state = replayed.learner.state()
    assert saved.state_digest == manifest.state_digest == state.digest
    assert json.loads(files["numbers.json"]) == json.loads(
        json.dumps({"numbers": state.numbers, "addresses": state.addresses})
    )
    policy = load_policy(configuration, directory)
    last = records(tiny, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert digest(dict(policy.named_parameters())) == last.digest
    expected = replayed.learner.policy.state_dict()
    assert all(value.equal(expected[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("name", ["learned", "heuristic"])
def test_the_evaluation_can_be_done_again(tiny: Tiny, configuration: Config, name: str) -> None:
    (checkpoint,) = (tiny.run_dir / "checkpoints").iterdir()
    trainer = configuration.simic_trainer
    again = evaluate(
        name,
        configuration.environment,
        held_out_seeds(trainer.seed, EPISODES),
        gamma=trainer.gamma,
        policy=load_policy(configuration, checkpoint),
    )
    (event,) = [
        r.header_as(PolicyEvaluated)
        for r in records(tiny, "supervisor", "PolicyEvaluated")
        if r.header["policy"] == name
    ]
    assert [episode.episode_return for episode in again.episodes] == list(event.returns)
    assert [episode.accuracy for episode in again.episodes] == list(event.accuracies)
    assert [float(episode.parameters_added) for episode in again.episodes] == list(event.parameters)


def test_the_supervisors_account_fits_the_learners(tiny: Tiny) -> None:
    (reported,) = records(tiny, "supervisor", "CheckpointReported")
    saved = records(tiny, "learner-0", "CheckpointSaved")[0].header_as(CheckpointSaved)
    told: dict[str, Any] = reported.header
    assert (told["learner_step"], told["environment_steps"]) == (saved.step, saved.environment_steps)
    assert told["digest"] == saved.state_digest
    assert Path(told["path"]) == tiny.run_dir / "checkpoints" / saved.directory
    exits = records(tiny, "supervisor", "ChildExited")
    assert {record.header["reason"] for record in exits} == {"clean"}


def test_under_a_limit_that_is_named_the_finished_run_is_trained_further(tiny: Tiny) -> None:
    """Last of those that look at the tiny run: afterwards it is another one."""
    before = records(tiny, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    said = say("run", "--resume", tiny.run_dir, "--max-steps", "200", "--no-evaluation", within_s=200)
    assert said.code == 0, said.err
    after = records(tiny, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert after.step > before.step
    assert after.environment_steps >= before.environment_steps + 200
    assert say("replay", tiny.run_dir, "--verify", within_s=200).code == 0


@pytest.mark.parametrize("words", [("status",), ("status", "nowhere"), ("log", "verify", ".")])
def test_what_is_not_there_is_unknown(tmp_path: Path, words: tuple[str, ...]) -> None:
    said = say(*words, cwd=tmp_path)
    assert said.code == 4
    assert len(said.err.splitlines()) == 1

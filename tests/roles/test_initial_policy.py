"""Weights to begin with: read once, from a run or a file, journaled, and folded ever after without either."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from esper_simic.config import Config
from esper_simic.errors import ConfigError
from esper_simic.events import PolicyImported, RunStarted
from supervisor import checkpoints
from supervisor.clock import ManualClock, SystemClock
from supervisor.config_file import load
from supervisor.journal import Journal, read
from supervisor.playback import Request, replay
from supervisor.report.past import learner_words
from supervisor.roles.attempts import Attempts
from supervisor.roles.fold import STATE_FILE, LearnerFold
from supervisor.roles.recovery import Recovery
from tests.roles.bench import NEVER_MS, RUN_ID, make_config
from tests.roles.scribe import Scribe

Weights = dict[str, Tensor]


def made_by(run_dir: Path, *assignments: str) -> Weights:
    """A run that trained and left two checkpoints; the policy in the newest."""
    with Scribe(run_dir, make_config(*assignments)) as scribe:
        scribe.teach(6)
        scribe.checkpoint()
        scribe.teach(2)
        scribe.checkpoint()
        policy = scribe.learner.engine.policy
        adapters = scribe.learner.engine.adapters
        state = policy.state_dict() if adapters is None else adapters.merged_state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    directory = tmp_path_factory.mktemp("source") / "run"
    return directory, made_by(directory, "simic_trainer.seed=9")


def begin(run_dir: Path, config: Config, life: int = 1) -> LearnerFold:
    """One life of a learner, as far as its recovery."""
    with (
        Journal(
            run_dir / "journal" / "learner-0", owner="learner-0", run_id=RUN_ID, commit_interval_ms=NEVER_MS
        ) as journal,
        Attempts(run_dir / "learner-0.attempts") as attempts,
    ):
        recovery = Recovery(run_dir, RUN_ID, life, config, journal, attempts, ManualClock(), lambda _: None)
        fold = recovery.run()
        assert journal.durable_position == journal.next_position == fold.position
        return fold


def beginning_with(path: Path, *assignments: str) -> Config:
    return make_config(f"simic_trainer.initial_policy={path}", *assignments)


def policy_of(fold: LearnerFold) -> Weights:
    return safetensors.torch.load(fold.learner.weights())


def assert_equal(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def kinds(run_dir: Path) -> list[str]:
    return [record.kind for record in read(run_dir / "journal" / "learner-0")]


def refusal(tmp_path: Path, path: Path, *assignments: str) -> str:
    """Why a run does not begin; no journal is left that anybody could take for one."""
    with pytest.raises(ConfigError, match=r"simic_trainer\.initial_policy") as caught:
        begin(tmp_path / "new", beginning_with(path, *assignments))
    assert kinds(tmp_path / "new") == []
    return str(caught.value)


def test_a_run_begins_with_the_newest_checkpoint_of_another(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    directory, weights = source
    fold = begin(tmp_path, beginning_with(directory))
    assert_equal(policy_of(fold), weights)
    assert kinds(tmp_path) == ["RunStarted", "PolicyImported"]
    (record,) = list(read(tmp_path / "journal" / "learner-0"))[1:]
    event = record.header_as(PolicyImported)
    assert Path(event.source).parent == directory / "checkpoints"
    assert_equal(safetensors.torch.load(bytes(record.frames[0])), weights)
    assert event.source in (words := learner_words(event) or ("", "", True))[1]
    assert not words[2]


def test_later_lives_and_replays_need_the_source_no_more(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source[0], copy)
    config = beginning_with(copy)
    first = begin(tmp_path / "run", config)
    shutil.rmtree(copy)
    later = begin(tmp_path / "run", config, life=2)
    assert later.learner.state().digest == first.learner.state().digest
    assert kinds(tmp_path / "run") == ["RunStarted", "PolicyImported", "LearnerRecovered"]
    report = replay(Request(tmp_path / "run", verify=True), SystemClock())
    assert (report.outcome, report.states_equal) == ("equal", 1)


def test_a_life_that_died_between_the_two_first_records_is_made_good(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    directory, weights = source
    config = beginning_with(directory)
    started = RunStarted(run_id=RUN_ID, config=config.model_dump(mode="json"), fingerprint={})
    with Journal(tmp_path / "journal" / "learner-0", owner="learner-0", run_id=RUN_ID) as journal:
        journal.append("RunStarted", started)
        journal.sync()
    assert_equal(policy_of(begin(tmp_path, config, life=2)), weights)
    assert kinds(tmp_path)[:2] == ["RunStarted", "PolicyImported"]


def test_without_the_key_nothing_is_journaled(tmp_path: Path) -> None:
    begin(tmp_path, make_config())
    begin(tmp_path, make_config(), life=2)
    assert kinds(tmp_path) == ["RunStarted", "LearnerRecovered"]


def test_weights_that_are_not_those_of_their_digest_are_not_folded(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    config = beginning_with(source[0])
    begin(tmp_path / "run", config)
    started, imported = read(tmp_path / "run" / "journal" / "learner-0")
    event = msgspec.structs.replace(imported.header_as(PolicyImported), digest="0" * 16)
    with Journal(tmp_path / "bad" / "journal" / "learner-0", owner="learner-0", run_id=RUN_ID) as journal:
        journal.append("RunStarted", started.header_as(RunStarted))
        journal.append("PolicyImported", event, [bytes(frame) for frame in imported.frames])
        journal.sync()
    report = replay(Request(tmp_path / "bad", verify=True), SystemClock())
    assert report.outcome == "divergent"


# -- what it can be read from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["policy", "state"])
def test_a_file_serves_as_well(tmp_path: Path, source: tuple[Path, Weights], form: str) -> None:
    directory, weights = source
    path = tmp_path / "some.safetensors"
    if form == "policy":
        safetensors.torch.save_file(weights, path)
    else:
        newest = checkpoints.list_checkpoints(directory / "checkpoints")[-1].path
        shutil.copy(newest / STATE_FILE, path)
    assert_equal(policy_of(begin(tmp_path / "run", beginning_with(path))), weights)


def test_a_bad_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source[0], copy)
    older, newest = sorted((copy / "checkpoints").glob("step-*"))
    (newest / STATE_FILE).write_bytes(b"spoilt")
    begin(tmp_path / "run", beginning_with(copy))
    record = list(read(tmp_path / "run" / "journal" / "learner-0"))[1]
    assert record.header_as(PolicyImported).source == str(older)
    (older / STATE_FILE).write_bytes(b"spoilt")
    words = refusal(tmp_path, copy)
    assert "no good checkpoint" in words
    assert older.name in words
    assert newest.name in words


def test_a_checkpoint_that_is_none_of_a_learner_is_passed_over(tmp_path: Path) -> None:
    directory = tmp_path / "odd"
    with Scribe(directory, make_config()) as scribe:
        scribe.journal.sync()
    manifest = {
        "run_id": RUN_ID,
        "step": 1,
        "environment_steps": 1,
        "journal_position": 0,
        "state_digest": "",
        "fingerprint": {},
        "score": None,
    }
    checkpoints.save(directory / "checkpoints", {"other.txt": b"x"}, manifest)
    assert f"it has no {STATE_FILE}" in refusal(tmp_path, directory)


def test_adapters_of_the_source_are_merged_by_its_own_scale(tmp_path: Path) -> None:
    adapted = ("simic_trainer.lora_start_step=0", "simic_trainer.lora_rank=2", "simic_trainer.lora_alpha=8")
    weights = made_by(tmp_path / "adapted", *adapted)
    assert_equal(policy_of(begin(tmp_path / "run", beginning_with(tmp_path / "adapted"))), weights)


def test_a_policy_with_adapters_begins_on_plain_weights(tmp_path: Path, source: tuple[Path, Weights]) -> None:
    config = beginning_with(source[0], "simic_trainer.lora_start_step=0", "simic_trainer.lora_rank=2")
    assert_equal(policy_of(begin(tmp_path, config)), source[1])


# -- what does not serve -----------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not there" in refusal(tmp_path, tmp_path / "nowhere")


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no run with a learner's journal" in refusal(tmp_path, tmp_path / "empty")


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    path.write_text("these are no weights")
    assert "is no safetensors file" in refusal(tmp_path, path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.safetensors"
    path.write_bytes(b"")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "cannot be read: Permission denied" in refusal(tmp_path, path)


def test_another_network_is_refused_with_its_first_difference(
    tmp_path: Path, source: tuple[Path, Weights]
) -> None:
    directory, weights = source
    words = refusal(tmp_path, directory, "simic_trainer.hidden_size=8")
    found = re.search(
        r"holds (\S+) as (\[.*?\]) float32, the configured policy has it as (\[.*?\]) float32", words
    )
    assert found is not None
    name, there, here = found.groups()
    assert there == str(list(weights[name].shape)) != here
    assert "take the network and the environment of the run that made them" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lack", "lacks {name}, which the configured policy has"),
        ("extra", "holds zz.more, which the configured policy has not"),
        ("dtype", "float64"),
        ("nan", "holds {name} with numbers that are not finite"),
    ],
)
def test_each_difference_is_named(
    tmp_path: Path, source: tuple[Path, Weights], change: str, words: str
) -> None:
    weights = dict(source[1])
    name = sorted(name for name, tensor in weights.items() if tensor.dtype == torch.float32)[-1]
    if change == "lack":
        del weights[name]
    elif change == "extra":
        weights["zz.more"] = torch.zeros(1)
    elif change == "dtype":
        weights[name] = weights[name].double()
    else:
        weights[name] = torch.full_like(weights[name], torch.nan)
    path = tmp_path / "changed.safetensors"
    safetensors.torch.save_file(weights, path)
    assert words.format(name=name) in refusal(tmp_path, path)


def test_numbers_of_heads_that_a_world_lacks_end_a_run_before_its_journal_is_begun(tmp_path: Path) -> None:
    config = load("gym", None, ["simic_trainer.entropy_multipliers={leap: 0.5}"])
    with pytest.raises(ConfigError, match="names leap, and this world's heads are action;"):
        begin(tmp_path, config)
    assert kinds(tmp_path) == []
    begin(tmp_path, load("gym", None, ["simic_trainer.entropy_multipliers={action: 0.5}"]))
    begin(tmp_path, config, life=2)  # begun once, whatever was let pass then

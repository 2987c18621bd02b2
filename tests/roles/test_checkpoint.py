"""The learner's checkpoint: written, verified, journaled, and the same policy when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch

from esper_simic.errors import ContractError, UnavailableError
from esper_simic.events import CheckpointSaved
from esper_simic.learner_state import digest
from supervisor import checkpoints
from supervisor.protocol import Checkpoint
from supervisor.roles.evaluate import load_policy
from tests.roles.bench import Bench, bench


@pytest.fixture
def learned(tmp_path: Path) -> Iterator[Bench]:
    """A loop that has made updates, and owes nothing."""
    with bench(tmp_path) as made:
        actors = [made.actor(0), made.actor(1)]
        for _ in range(3):
            for actor in actors:
                made.send(actor, made.loop.learner.steps_done)
            made.step_all()
            made.make_durable()
        assert made.loop.learner.steps_done >= 2
        yield made


def save(learned: Bench) -> tuple[Checkpoint, Path]:
    saved = learned.checkpointer.save(learned.loop.learner)
    return saved, Path(saved.path)


def test_a_checkpoint_holds_the_state_and_stands_in_the_journal(learned: Bench) -> None:
    learner = learned.loop.learner
    saved, directory = save(learned)
    manifest, files = checkpoints.load(directory)
    assert set(files) == {"state.safetensors", "numbers.json"}
    tensors = safetensors.torch.load(files["state.safetensors"])
    state = learner.state()
    assert tensors.keys() == state.tensors.keys()
    assert all(tensors[name].equal(state.tensors[name]) for name in tensors)
    assert any(name.startswith("optimizer.") for name in tensors)
    assert json.loads(files["numbers.json"]) == json.loads(
        json.dumps({"numbers": state.numbers, "addresses": state.addresses})
    )

    record = learned.records("CheckpointSaved")[-1]
    event = record.header_as(CheckpointSaved)
    assert (event.step, event.environment_steps) == (learner.steps_done, learner.environment_steps)
    assert event.directory == directory.name
    assert event.files == {name: file.sha256 for name, file in manifest.files.items()}
    (staged,) = learned.records("CheckpointStaged")
    assert manifest.journal_position == event.staged_at == staged.position, (
        "the state of everything before it, and of nothing else"
    )
    assert staged.header["state_digest"] == state.digest
    assert event.state_digest == manifest.state_digest == saved.digest == state.digest
    assert (manifest.run_id, manifest.step) == ("run-1", learner.steps_done)
    assert manifest.fingerprint["torch"]


def test_nothing_owed_is_lost_and_everything_before_is_durable(learned: Bench) -> None:
    learned.send(learned.actors[0], learned.loop.learner.steps_done)
    before = learned.journal.next_position
    assert learned.journal.durable_position < before
    save(learned)
    assert learned.journal.durable_position == before + 2, "that it was staged, and that it counts"


def test_the_loaded_policy_is_the_learners(learned: Bench) -> None:
    _, directory = save(learned)
    policy = load_policy(learned.config, directory)
    expected = learned.loop.learner.policy.state_dict()
    assert policy.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in policy.state_dict().items())
    assert digest(dict(policy.named_parameters())) == learned.records("LearnerStepped")[-1].header["digest"]


@pytest.mark.parametrize("name", ["state.safetensors", "numbers.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name(learned: Bench, name: str) -> None:
    _, directory = save(learned)
    path = directory / name
    data = bytearray(path.read_bytes())
    data[0 if name == "manifest.json" else len(data) // 2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ContractError, match=name):
        load_policy(learned.config, directory)


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_checkpoint_without_a_file_is_refused_by_name(learned: Bench, name: str) -> None:
    _, directory = save(learned)
    (directory / name).unlink()
    with pytest.raises((ContractError, UnavailableError), match=name):
        load_policy(learned.config, directory)


def test_a_checkpoint_of_another_network_is_refused_and_says_so(learned: Bench) -> None:
    _, directory = save(learned)
    other = learned.config.model_copy(
        update={"simic_trainer": learned.config.simic_trainer.model_copy(update={"hidden_size": 32})}
    )
    with pytest.raises(ContractError, match=directory.name):
        load_policy(other, directory)


def test_a_second_checkpoint_does_not_replace_the_first(learned: Bench) -> None:
    first, second = save(learned)[1], save(learned)[1]
    assert first != second
    assert checkpoints.newest(first.parent) == second
    for directory in (first, second):
        load_policy(learned.config, directory)


def test_a_checkpoint_of_somebody_else_is_refused(tmp_path: Path, learned: Bench) -> None:
    manifest = {
        "run_id": "run-1",
        "step": 1,
        "environment_steps": 1,
        "journal_position": 1,
        "state_digest": "",
        "fingerprint": {},
    }
    directory = checkpoints.save(tmp_path / "other", {"notes.txt": b"hello"}, manifest)
    with pytest.raises(ContractError, match="state.safetensors"):
        load_policy(learned.config, directory)

"""Adapters to begin with: saved alone by one run, taken over by another on the very weights they were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from esper_simic.config import Config
from esper_simic.errors import ConfigError, ContractError
from esper_simic.events import PolicyImported
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.policies.lora import merged_weights
from supervisor import checkpoints
from supervisor.clock import SystemClock
from supervisor.journal import read
from supervisor.playback import Request, replay
from supervisor.playback.summaries import summary
from supervisor.report.past import learner_words
from supervisor.roles.adapters import adapters_in
from supervisor.roles.fold import STATE_FILE, config_of_journal, read_state
from tests.roles.bench import make_config
from tests.roles.scribe import Scribe
from tests.roles.test_initial_policy import assert_equal, begin, kinds, policy_of

ADAPTED = ("simic_trainer.lora_start_step=0", "simic_trainer.lora_rank=2", "simic_trainer.lora_alpha=8")
KEY = "simic_trainer.initial_adapters"


def trained(run_dir: Path, *assignments: str, initial: Path | None = None) -> Path:
    """A run that made a few updates and a checkpoint; with weights to begin with, if they are named."""
    config = make_config(*assignments)
    with Scribe(run_dir, config) as scribe:
        if initial is not None:
            source = begin(run_dir.with_name(f"{run_dir.name}-start"), beginning(initial, None, *assignments))
            scribe.learner.begin_with(source.learner.weights())
        scribe.teach(6)
        scribe.checkpoint()
    return run_dir


def beginning(policy: Path | None, adapters: Path | None, *assignments: str) -> Config:
    named = [f"simic_trainer.initial_policy={policy}"] if policy else []
    named += [f"{KEY}={adapters}"] if adapters else []
    return make_config(*named, *assignments)


def adapters_of(run_dir: Path) -> AdapterState:
    newest = checkpoints.list_checkpoints(run_dir / "checkpoints")[-1].path
    return adapters_in(read_state(newest)[1].tensors, config_of_journal(run_dir / "journal" / "learner-0"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("base") / "base", "simic_trainer.seed=9")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run on the weights of `base`, whose adapters alone learned."""
    return trained(tmp_path_factory.mktemp("adapted") / "adapted", *ADAPTED, initial=base)


@pytest.fixture
def saved(tmp_path: Path, adapted: Path) -> Path:
    """Its adapters as a file."""
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(adapters_of(adapted).to_bytes())
    return path


def begun_with(run_dir: Path) -> PolicyImported:
    assert kinds(run_dir)[:2] == ["RunStarted", "PolicyImported"]
    record = list(read(run_dir / "journal" / "learner-0"))[1]
    return record.header_as(PolicyImported)


@pytest.mark.parametrize("form", ["file", "run"])
def test_weights_and_adapters_together_are_the_policy_that_was_trained(
    tmp_path: Path, base: Path, adapted: Path, saved: Path, form: str
) -> None:
    run_dir, adapters = tmp_path / "run", saved if form == "file" else adapted
    fold = begin(run_dir, beginning(base, adapters, *ADAPTED, "simic_trainer.seed=3"))
    there = trained_policy(adapted)
    assert_equal(policy_of(fold), there)
    assert any(not torch.equal(there[name], tensor) for name, tensor in trained_policy(base).items())
    event = begun_with(run_dir)
    assert event.adapters_source.startswith(str(adapters))
    for words in (summary(event), (learner_words(event) or ("", "", True))[1]):
        assert event.source in words
        assert event.adapters_source in words


def trained_policy(run_dir: Path) -> dict[str, torch.Tensor]:
    """What a run's newest checkpoint acts as, by its own tensors."""
    newest = checkpoints.list_checkpoints(run_dir / "checkpoints")[-1].path
    tensors = safetensors.torch.load_file(newest / STATE_FILE)
    prefix = "policy."
    state = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
    return merged_weights(state, rank=2, alpha=8.0)


def test_later_lives_and_replays_need_neither_source(tmp_path: Path, base: Path, saved: Path) -> None:
    copy, run_dir = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(base, copy)
    config = beginning(copy, saved, *ADAPTED)
    first = begin(run_dir, config)
    shutil.rmtree(copy)
    saved.unlink()
    later = begin(run_dir, config, life=2)
    assert later.learner.state().digest == first.learner.state().digest
    report = replay(Request(run_dir, verify=True), SystemClock())
    assert (report.outcome, report.states_equal) == ("equal", 1)


def test_the_state_that_an_ill_update_goes_back_to_has_them(tmp_path: Path, base: Path, saved: Path) -> None:
    engine = begin(tmp_path / "run", beginning(base, saved, *ADAPTED)).learner.engine
    before = engine.acting_weights()
    assert engine.adapters is not None
    with torch.no_grad():
        for parameter in engine.adapters.parameters():
            parameter.fill_(torch.nan)
    engine.restore_good()
    assert_equal(engine.acting_weights(), before)


def test_a_run_gives_the_weights_under_its_own_adapters_where_those_are_asked_for(
    tmp_path: Path, adapted: Path, saved: Path
) -> None:
    fold = begin(tmp_path / "run", beginning(adapted, saved, *ADAPTED))
    assert_equal(policy_of(fold), trained_policy(adapted))
    engine = fold.learner.engine
    assert engine.adapters is not None
    assert engine.adapters.base_digest() == adapters_of(adapted).base_digest


def test_adapters_of_weights_that_were_merged_fit_those(tmp_path: Path, adapted: Path) -> None:
    second = trained(tmp_path / "second", *ADAPTED, initial=adapted)
    assert adapters_of(second).base_digest != adapters_of(adapted).base_digest
    fold = begin(tmp_path / "run", beginning(adapted, second, *ADAPTED))
    assert_equal(policy_of(fold), trained_policy(second))


# -- what does not serve -----------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, config: Config) -> str:
    """Why a run does not begin; it leaves no journal behind."""
    with pytest.raises(ConfigError, match=r"simic_trainer\.initial_adapters") as caught:
        begin(tmp_path / "new", config)
    assert kinds(tmp_path / "new") == []
    return str(caught.value)


def test_adapters_of_other_weights_are_refused(tmp_path: Path, saved: Path) -> None:
    other = trained(tmp_path / "other", "simic_trainer.seed=4")
    words = refusal(tmp_path, beginning(other, saved, *ADAPTED))
    assert f"the adapters in {saved} were trained on weights of digest " in words
    assert "name in simic_trainer.initial_policy what they were trained on" in words


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("simic_trainer.lora_rank=4", "adapters of rank 2 do not fit a policy with rank 4; take their rank"),
        ("simic_trainer.lora_alpha=9", "adapters of alpha 8.0 do not fit a policy with alpha 9.0"),
    ],
)
def test_adapters_of_another_form_are_refused(
    tmp_path: Path, base: Path, saved: Path, assignment: str, words: str
) -> None:
    assert words in refusal(tmp_path, beginning(base, saved, *ADAPTED, assignment))


def test_adapters_that_are_not_finite_are_refused(tmp_path: Path, base: Path, adapted: Path) -> None:
    state = adapters_of(adapted)
    name = next(iter(state.tensors))
    state.tensors[name].fill_(torch.inf)
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(state.to_bytes())
    words = refusal(tmp_path, beginning(base, path, *ADAPTED))
    assert f"{path} holds {name} with numbers that are not finite" in words


def test_a_file_of_something_else_is_named(tmp_path: Path, base: Path, adapted: Path) -> None:
    newest = checkpoints.list_checkpoints(adapted / "checkpoints")[-1].path
    path = tmp_path / "state.safetensors"
    shutil.copy(newest / STATE_FILE, path)
    assert f"{path}: this safetensors file does not hold adapters" in refusal(
        tmp_path, beginning(base, path, *ADAPTED)
    )
    assert "is not there" in refusal(tmp_path, beginning(base, tmp_path / "nowhere", *ADAPTED))


def test_a_run_without_a_checkpoint_is_named_as_the_one_of_the_adapters(tmp_path: Path, base: Path) -> None:
    with Scribe(tmp_path / "young", make_config(*ADAPTED)) as scribe:
        scribe.journal.sync()
    assert "young has no good checkpoint" in refusal(tmp_path, beginning(base, tmp_path / "young", *ADAPTED))


def test_numbers_of_an_unknown_type_are_named(tmp_path: Path, base: Path, saved: Path) -> None:
    data = saved.read_bytes()
    odd = tmp_path / "odd.safetensors"
    header = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + header])
    described["x.a"] = {"dtype": "F4", "shape": [2], "data_offsets": [len(data) - 8 - header] * 2}
    described["x.a"]["data_offsets"][1] += 1
    text = json.dumps(described).encode()
    odd.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + header :] + b"\0")
    assert "a type that is not known here: 'F4'" in refusal(tmp_path, beginning(base, odd, *ADAPTED))
    with pytest.raises(ConfigError, match=r"initial_policy: .* a type that is not known here: 'F4'"):
        begin(tmp_path / "new", beginning(odd, None))


def test_a_whole_state_with_adapters_does_not_say_how_they_were_made(tmp_path: Path, adapted: Path) -> None:
    newest = checkpoints.list_checkpoints(adapted / "checkpoints")[-1].path
    shutil.copy(newest / STATE_FILE, tmp_path / "state.safetensors")
    with pytest.raises(
        ConfigError, match=r"initial_policy: .* whose rank and alpha only its run knows; name that"
    ):
        begin(tmp_path / "new", beginning(tmp_path / "state.safetensors", None))


def test_a_run_without_adapters_has_none_to_give(tmp_path: Path, base: Path) -> None:
    words = refusal(tmp_path, beginning(base, base, *ADAPTED))
    assert "it has no adapters; they begin with the update that simic_trainer.lora_start_step names" in words


def test_a_state_of_another_configuration_is_none_of_its_run(adapted: Path) -> None:
    newest = checkpoints.list_checkpoints(adapted / "checkpoints")[-1].path
    _, state = read_state(newest)
    other = make_config(*ADAPTED, "simic_trainer.hidden_size=8")
    with pytest.raises(ContractError, match="not one of a learner of its run"):
        adapters_in(state.tensors, other)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("simic_trainer.initial_policy=x",), "set lora_start_step to 0"),
        (("simic_trainer.initial_policy=x", "simic_trainer.lora_start_step=5"), "set lora_start_step to 0"),
        (("simic_trainer.lora_start_step=0",), "name those in initial_policy"),
    ],
)
def test_adapters_need_their_weights_and_a_beginning(assignments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(f"{KEY}=y", *assignments)

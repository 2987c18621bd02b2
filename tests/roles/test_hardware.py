"""The hardware of each experience: told once a life, journaled once, named by every unroll."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest

from esper_simic.events import ExperienceAdmitted, HardwareNoted
from esper_simic.hardware import HardwareContext
from supervisor import hardware as module
from supervisor.hardware import hardware_here
from supervisor.protocol import Hello
from supervisor.roles.learner_line import LearnerLine
from tests.roles.bench import Actor, Bench, bench
from tests.roles.pair import SMALL, Pair, control_line
from tests.roles.test_failed_steps import EVERY, folded

HERE = HardwareContext(device_type="cpu", device_id="Xenon 7", total_memory_gb=16.0, cores=2, threads=1)
THERE = HardwareContext(device_type="cuda", device_id="H", total_memory_gb=80.0, compute_capability=90)


def greeted(held: Bench, index: int, hardware: HardwareContext | None, incarnation: int = 1) -> Actor:
    actor = held.stranger(index, incarnation)
    actor.client.send(Hello(actor=index, incarnation=incarnation, hardware=hardware))
    held.settle(actor)
    held.make_durable()
    return actor


def named(held: Bench) -> list[str]:
    return [r.header_as(ExperienceAdmitted).hardware for r in held.records("ExperienceAdmitted")]


def test_each_unroll_names_hardware_that_is_journaled_once(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY) as held:
        one, two = greeted(held, 0, HERE), greeted(held, 1, HERE)
        held.send(one)
        held.send(two)
        again = greeted(held, 1, THERE, incarnation=2)
        held.send(again)
        noted = [record.header_as(HardwareNoted) for record in held.records("HardwareNoted")]
        assert noted == [
            HardwareNoted(id=HERE.id, hardware=HERE),
            HardwareNoted(id=THERE.id, hardware=THERE),
        ]
        assert named(held) == [HERE.id, HERE.id, THERE.id]
        assert len(HERE.id) == 8
        digest = held.loop.learner.state().digest
        held.make_durable()
        held.kill()
        held.live(2)
        assert held.loop.learner.state().digest == digest
        held.send(greeted(held, 0, HERE, incarnation=3))
        assert len(held.records("HardwareNoted")) == 2, "the journal has it"
        assert named(held)[-1] == HERE.id
        assert folded(held).learner.ledger.hardware == {HERE.id, THERE.id}


def test_a_checkpoint_has_what_is_noted_and_no_digest_does(tmp_path: Path) -> None:
    with bench(tmp_path / "one", EVERY) as held, bench(tmp_path / "two", EVERY) as other:
        held.send(greeted(held, 0, HERE))
        other.send(greeted(other, 0, None))
        assert named(other) == [""]
        assert held.loop.learner.state().digest == other.loop.learner.state().digest
        assert held.loop.learner.state().addresses["hardware"] == [HERE.id]
        assert "hardware" not in other.loop.learner.state().addresses
        held.checkpointer.save(held.loop.learner)
        held.make_durable()
        held.kill()
        assert held.live(2).is_exact
        assert held.recovery.checkpoint_step == 0
        assert held.loop.learner.ledger.hardware == {HERE.id}


def test_an_actor_says_on_what_it_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(tmp_path, *SMALL) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.wait(lambda: held.loop.learner.environment_steps > 0, pair.step_turn)
        pair.stop(child)
        (noted,) = [record.header_as(HardwareNoted) for record in held.records("HardwareNoted")]
    assert noted.hardware == hardware_here(threads=1)
    assert LearnerLine.__init__.__defaults__ == (None,), "others need not"


def test_the_hardware_here_is_what_the_kernel_says(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor : 0\nmodel name\t: Xenon 7 @ 2 GHz" + "!" * 200 + "\nmodel name : other\n")
    found = hardware_here(3, told)
    assert found.device_id.startswith("Xenon 7 @ 2 GHz!")
    assert len(found.device_id) == module.MODEL_BYTES_MAX
    assert (found.device_type, found.threads, found.compute_capability) == ("cpu", 3, 0)
    assert found.cores >= 1
    assert found.total_memory_gb == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.06)
    told.write_text("processor : 0\n")
    assert hardware_here(1, told).device_id == platform.machine()
    assert hardware_here(1, tmp_path / "none").device_id == platform.machine()

"""What a supervisor would show of a run."""

from __future__ import annotations

from typing import Any

import msgspec

from supervisor.events import PolicyEvaluated
from supervisor.vitals import Snapshot, Vitals
from tests.supervisor.worlds import World


def picture(world: World, **changes: Any) -> Snapshot:
    shot = Vitals().snapshot(
        world.state,
        now_s=world.now_s,
        run_dir="/r",
        config=world.config,
        memory_bytes={3011: 2**20},
        refused={},
    )
    return msgspec.structs.replace(shot, **changes)


def measured(policy: str, mean: float) -> PolicyEvaluated:
    summary = {
        f"{key}_{part}": mean + offset
        for key in ("return", "accuracy", "parameters")
        for part, offset in (("mean", 0.0), ("low", -1.0), ("high", 1.0))
    }
    return PolicyEvaluated(
        at_s=1.0,
        policy=policy,
        returns=(mean,) * 3,
        accuracies=(mean,) * 3,
        parameters=(mean,) * 3,
        summary=summary,
    )

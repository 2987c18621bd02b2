"""What the replays of several test modules are made on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from supervisor.journal import Record
from tests.supervisor.recorded_learner import Rewriting, life

REWARD_FRAME = -3


def record_two_lives(run_dir: Path) -> Path:
    """Two lives of a learner: 25 updates, a refusal, three checkpoints, a tail folded by the second life."""
    with life(run_dir) as first:
        first.learn(range(8))
        first.refuse()
        first.checkpoint()
        first.learn(range(8, 18))
        first.checkpoint()
        first.learn(range(18, 22))
    with life(run_dir, incarnation=2) as second:
        second.learn(range(22, 32))
        second.checkpoint()
        second.learn(range(32, 36))
    return run_dir


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def with_reward_changed(position: int, by: float = 1.0) -> Callable[[Record], Rewriting | None]:
    def change(record: Record) -> Rewriting | None:
        if record.position != position:
            return None
        frames = [bytes(frame) for frame in record.frames]
        rewards = np.frombuffer(frames[REWARD_FRAME], dtype="<f4").copy()
        rewards[0] += by
        frames[REWARD_FRAME] = rewards.tobytes()
        return record.header, frames

    return change

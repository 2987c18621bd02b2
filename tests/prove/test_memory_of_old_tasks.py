"""What a second task costs of the first, with and without elastic weight consolidation, seed by seed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.known_answers.two_tasks import RANDOM, remember

pytestmark = pytest.mark.timeout(1200)

SEEDS = (0, 1, 2)
TURNS = 250
LAMBDA = 100.0


def test_consolidation_keeps_more_of_an_old_task_and_leaves_room_for_a_new_one() -> None:
    free = [remember(seed, TURNS, 0.0) for seed in SEEDS]
    held = [remember(seed, TURNS, LAMBDA) for seed in SEEDS]
    print("\n| lambda | seed | first task, learned | first task, after | forgotten | second task | updates |")
    print("|---|---|---|---|---|---|---|")
    for strength, memories in ((0.0, free), (LAMBDA, held)):
        for seed, memory in zip(SEEDS, memories, strict=True):
            figures = (memory.learned, memory.kept, memory.forgotten, memory.new)
            shown = " | ".join(f"{figure:.3f}" for figure in figures)
            print(f"| {strength:g} | {seed} | {shown} | {memory.updates} |")
    for one, other in zip(free, held, strict=True):
        assert one.learned == other.learned >= 0.85, "until the first task was passed nothing was held"
        assert other.forgotten < one.forgotten - 0.1
        assert other.new > RANDOM + 0.3, "and the second is learned"
    assert np.mean([memory.forgotten for memory in free]) > 0.35
    assert np.mean([memory.forgotten for memory in held]) < 0.25

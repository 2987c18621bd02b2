"""Every algorithm comes close to the known optimum of every problem within its steps, for 5 of 5 seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.known_answers.claims import CLAIMS, holds, tried

SEEDS = range(5)
ALGORITHMS = tuple(dict.fromkeys(claim.algorithm for claim in CLAIMS))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_five_of_five_seeds_reach_it(algorithm: str, record_proof: Callable[[str, str], None]) -> None:
    lines = [
        "| problem | environment steps | updates | optimum | random | worst of 5 | median of 5 |",
        "|---|---|---|---|---|---|---|",
    ]
    failed = []
    for claim in CLAIMS:
        if claim.algorithm != algorithm:
            continue
        answers = sorted((tried(claim, seed) for seed in SEEDS), key=lambda answer: answer.reached)
        worst, middle = answers[0], answers[len(answers) // 2]
        lines.append(
            f"| {claim.problem} | {claim.steps:,} | {middle.updates:,} | {worst.optimum:.3f} | {worst.random:.3f} "
            f"| {worst.learned:.3f} ({worst.reached:.1%}) | {middle.learned:.3f} ({middle.reached:.1%}) |"
        )
        for answer in answers:
            try:
                holds(claim, answer)
            except AssertionError as error:
                failed.append(str(error))
    record_proof(f"Known answers: {algorithm}", "\n".join(lines))
    assert not failed, "\n".join(failed)

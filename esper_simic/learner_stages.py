"""A learner's curriculum as its journal moves it: outcomes counted, stages judged, requests answered.

`verdict` and `asked` say what a look or a request would come to, as the event that is journaled; `judge` folds that
event. Only `counted` and `judge` change anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from esper_simic.config_curriculum import CurriculumKeys
from esper_simic.curriculum import Curriculum, CurriculumState
from esper_simic.curriculum_facts import (
    CurriculumAdvanced,
    CurriculumAnswered,
    CurriculumFact,
    CurriculumReply,
    CurriculumRequest,
)
from esper_simic.events import CurriculumJudged, ExperienceAdmitted

NO_CURRICULUM = "this run follows no curriculum: no stage has an environment of its own"


class Stages:
    """Where a training stands in its curriculum; in a run that follows none, at 0 for ever.

    Args:
        keys: The curriculum.
        samples_to_hold: How many experiences there are now from which a stage that is passed can be held (EWC).
    """

    def __init__(self, keys: CurriculumKeys, samples_to_hold: Callable[[], int]) -> None:
        self.rules = Curriculum.of(keys) if keys.follows_curriculum else None
        self.state = CurriculumState()
        self._samples_to_hold = samples_to_hold

    def counted(self, event: ExperienceAdmitted) -> None:
        """Fold the outcomes that came with an unroll."""
        if self.rules is not None:
            successes = self.rules.outcomes(event.stage, event.episodes)
            self.state = self.rules.counted(self.state, event.stage, successes)

    def verdict(self, now_s: float) -> CurriculumJudged | None:
        """What a look at this time would come to; None for nothing."""
        if self.rules is None:
            return None
        judged = self.rules.judged(self.state, now_s)
        return self._event(now_s, judged.state, judged.facts) if judged.facts else None

    def asked(
        self, request: CurriculumRequest, now_s: float
    ) -> tuple[CurriculumReply, CurriculumJudged | None]:
        """The answer to a request, and what it would come to; None where it is repeated, or there is no curriculum."""
        if self.rules is None:
            refused = CurriculumReply(
                request_id=request.request_id,
                correlation_id=request.correlation_id,
                stage="",
                episodes=0,
                success_rate=0.0,
                advanced=False,
                refusal=NO_CURRICULUM,
            )
            return refused, None
        answered = self.rules.answer(self.state, request, now_s)
        if answered.state == self.state:
            return answered.reply, None
        told = CurriculumAnswered(request=request, reply=answered.reply)
        return answered.reply, self._event(now_s, answered.state, [told, *answered.facts])

    def judge(self, event: CurriculumJudged) -> None:
        """Fold a `CurriculumJudged`, of a look or of a request.

        Where outcomes are missing that stood before it (quarantined), the record is believed: actors were sent to its
        stage, and no stage is gone back to.
        """
        if self.rules is None:
            return
        request = next((fact.request for fact in event.facts if isinstance(fact, CurriculumAnswered)), None)
        if request is None:
            self.state = self.rules.judged(self.state, event.at_s).state
        else:
            self.state = self.rules.answer(self.state, request, event.at_s).state
        self.state = self.rules.standing(self.state, event.stage)

    def _event(self, now_s: float, state: CurriculumState, facts: list[CurriculumFact]) -> CurriculumJudged:
        advanced = any(isinstance(fact, CurriculumAdvanced) for fact in facts)
        return CurriculumJudged(
            at_s=now_s,
            stage=state.stage,
            facts=facts,
            consolidated=self._samples_to_hold() if advanced else 0,
        )

    def numbers(self) -> dict[str, Any]:
        """All of it, JSON types only; nothing where there is no curriculum."""
        if self.rules is None:
            return {}
        return {"curriculum": msgspec.json.decode(msgspec.json.encode(self.state))}

    def load(self, numbers: dict[str, Any]) -> None:
        """Become what gave these `numbers`.

        Raises:
            KeyError: They are of a run without a curriculum.
            ValueError: They are not such, or of another curriculum.
        """
        if self.rules is not None:
            self.state = self.rules.restored(numbers["curriculum"])

"""What happened to a curriculum, as facts of the journal, and what is asked of one."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

from esper_simic.safety_facts import BreakerFact


class CoordinationMode(Enum):
    """Who sets the pace.

    INDEPENDENT: this training, by its own stages; ends whatever an earlier request asked for.
    SYNCHRONIZED: this training, but not beyond the stage named: so several of them wait for each other.
    TASK_DRIVEN: this training, but the stage named is passed by the request's numbers.
    STRATEGY_DRIVEN: the requester. The training goes on to the stage named, if it is the next one, and stays there
        until told otherwise; success rates are not judged.
    """

    SYNCHRONIZED = "SYNCHRONIZED"
    TASK_DRIVEN = "TASK_DRIVEN"
    STRATEGY_DRIVEN = "STRATEGY_DRIVEN"
    INDEPENDENT = "INDEPENDENT"


Name = Annotated[str, msgspec.Meta(max_length=128)]
"""What another process calls something; it is kept in the state."""


class CurriculumRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a coordinator asks of one training.

    Attributes:
        request_id: A repeated one gets its first answer.
        stage: The stage that it is about, by name.
        difficulty: Of that stage, in [0, 1]: who asks by another curriculum is refused.
        min_success_rate: In (0, 1]; this and the two counts replace the stage's own where TASK_DRIVEN.
        min_episodes: >= 1.
        max_episodes: >= min_episodes.
        mode: Who sets the pace from now on.
        issued_at_s: Seconds since 1970, by the requester's clock; kept, never compared.
        correlation_id: Goes back with the answer.
    """

    request_id: Name
    stage: Name
    difficulty: float
    min_success_rate: float
    min_episodes: int
    max_episodes: int
    mode: CoordinationMode
    issued_at_s: float
    correlation_id: Name = ""


class CurriculumReply(msgspec.Struct, frozen=True, kw_only=True):
    """Where the training stands after a request.

    Attributes:
        request_id: Of the request.
        correlation_id: Of the request.
        stage: Name of the stage now.
        episodes: Counted in its round.
        success_rate: Now.
        advanced: Whether the request led to the next stage.
        refusal: Why the request was not obeyed; empty where it was.
    """

    request_id: str
    correlation_id: str
    stage: str
    episodes: int
    success_rate: float
    advanced: bool
    refusal: str = ""


class CurriculumAdvanced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage was passed with this rate after so many episodes of its last round."""

    from_stage: str
    to_stage: str
    difficulty: float
    episodes: int
    success_rate: float


class CurriculumHeld(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A round of a stage ended without its success rate; `rounds` have by now."""

    stage: str
    rounds: int
    episodes: int
    success_rate: float


class CurriculumAnswered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Somebody asked something of the curriculum, and was answered so; what the request led to stands beside."""

    request: CurriculumRequest
    reply: CurriculumReply


CurriculumFact = CurriculumAdvanced | CurriculumHeld | CurriculumAnswered | BreakerFact

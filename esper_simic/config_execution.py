"""`simic_trainer`: how updates are carried out on this machine's device."""

from __future__ import annotations

from pydantic import Field

from esper_simic.config_section import Section


class ExecutionKeys(Section):
    """Where updates are computed, and in how many parts; what is fastest there is chosen by itself (`execution`)."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$",
        description="The learner's device: auto (a GPU if there is one), cpu, cuda (there must be one) or cuda:N.",
    )
    plain_execution: bool = Field(
        False,
        description="The plain way on that device: nothing compiled, fused, rounded or recorded. For finding errors.",
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=256,
        description="Parts, by lanes, in which the gradient of a batch or minibatch is summed up: less memory, "
        "one more forward pass. One of fewer lanes has a part a lane.",
    )

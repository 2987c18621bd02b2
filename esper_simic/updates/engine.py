"""What learns: weights, their optimisers, what holds them to old tasks, and the last state of them that was good.

The engine makes updates and knows nothing of journals, buffers or time. All of it that decides what comes is in
`tensors` and `numbers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from esper_simic import seeding
from esper_simic.algorithms.ewc import Consolidation, choose_parameters, consolidate, estimate_fisher
from esper_simic.config import TrainerConfig
from esper_simic.errors import ConfigError, ContractError
from esper_simic.events import AdaptersBegun
from esper_simic.execution import CPU, Execution, unheard
from esper_simic.learning_rates import GroupConfig, LRPolicy
from esper_simic.loss_scale import LossScale
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.policies.build import build_policy
from esper_simic.policies.gaussian import HEAD
from esper_simic.policies.lora import Adapters, attach, has_adapters
from esper_simic.rate_facts import RateChanged, Tampered
from esper_simic.safety_step import StepMode
from esper_simic.specs import Choices, ExperienceSpec
from esper_simic.telemetry import StepObserver
from esper_simic.updates.batch import Batch
from esper_simic.updates.computation import Computation
from esper_simic.updates.fisher import sampled_log_probs
from esper_simic.updates.imitation import imitation_update
from esper_simic.updates.impala import impala_update
from esper_simic.updates.iql import IqlUpdate
from esper_simic.updates.optimisers import UNWATCHED, Group, Optimisers
from esper_simic.updates.ppo import ppo_update
from esper_simic.updates.update import Terms, Update, Updated

POLICY: Final = "policy."
CRITICS: Final = "critics."
SLOW_CRITICS: Final = "slow_critics."
OPTIMIZER: Final = "optimizer."
ACTING: Final = "acting."
OLD_TASKS: Final = "ewc."
GOOD: Final = "good."


class Engine:
    """Weights and everything that moves them.

    Args:
        trainer: The configuration.
        spec: Shapes of observations and actions.
        execution: How updates are carried out. Weights, optimisers and batches are on its device; what is given away
            (`tensors`, `acting_weights`) is not.
    """

    def __init__(self, trainer: TrainerConfig, spec: ExperienceSpec, execution: Execution = CPU) -> None:
        self._trainer, self._execution = trainer, execution
        self.computation = Computation(execution, trainer.gradient_accumulation)
        self.policy = build_policy(spec, trainer, seeding.generator(trainer.seed, "policy")).to(
            execution.device
        )
        self._iql = (
            IqlUpdate(spec, trainer, seeding.generator(trainer.seed, "critics"))
            if trainer.algorithm == "IQL"
            else None
        )
        if self._iql is not None:
            self._iql.to(execution.device)
        self._update = self._algorithm()
        self.optimisers = self._optimisers(execution.loss_scale())
        self.consolidation: Consolidation | None = None
        self.consolidating: Callable[[], None] = unheard
        """Told when the estimate of what an old task needs begins and after each batch of it, for whoever waits."""
        self._acting_normaliser = self._normaliser_now()
        self._good: dict[str, Tensor] | None = None
        self.adapters: Adapters | None = None

    def _algorithm(self) -> Update:
        if self._iql is not None:
            return self._iql
        algorithms: dict[str, Update] = {
            "IMPALA": impala_update,
            "PPO": ppo_update,
            "APPO": ppo_update,
            "BC": imitation_update,
        }
        return algorithms[self._trainer.algorithm]

    def _optimisers(self, loss_scale: LossScale | None) -> Optimisers:
        return Optimisers(self._groups(), self._execution.optimizer_kwargs(), loss_scale)

    def _groups(self) -> dict[str, Group]:
        trainer = self._trainer

        def group(parameters: Sequence[nn.Parameter], policy: LRPolicy, rate: float) -> Group:
            schedule = GroupConfig(
                policy, rate, trainer.warmup_epochs, trainer.min_lr, trainer.effective_horizon_updates
            )
            return Group(parameters, schedule)

        policy_lr, value_lr = trainer.effective_policy_lr, trainer.effective_value_lr
        groups = {
            "policy": group(self.policy.policy_parameters(), LRPolicy.POLICY_NETWORK, policy_lr),
            "value": group(self.policy.value_parameters(), LRPolicy.VALUE_NETWORK, value_lr),
        }
        if self._iql is not None:
            critics = list(self._iql.critics.parameters())
            groups["critics"] = group(critics, LRPolicy.VALUE_NETWORK, value_lr)
        return groups

    # -- adapters --------------------------------------------------------------------------------------------------

    def begin_adapters(self) -> AdaptersBegun:
        """Freeze the weights; from now on low-rank adapters on them learn, by optimisers of their own.

        What was held of old tasks is held no more: the weights that were held are frozen.
        """
        trainer = self._trainer
        self.adapters = attach(
            self.policy,
            seeding.generator(trainer.seed, "lora"),
            rank=trainer.lora_rank,
            alpha=trainer.lora_alpha,
            dropout=trainer.lora_dropout,
        )
        self.adapters.freeze_base()
        self.computation.policy_changed()
        before, self.optimisers = self.optimisers, self._optimisers(self.optimisers.loss_scale)
        if self._iql is not None:
            self.optimisers.go_on(before, "critics")  # their parameters are the same as ever
        self.consolidation = None
        self.keep_good()
        return self.adapters_begun()

    def adapters_begun(self) -> AdaptersBegun:
        """That the adapters that there are have begun."""
        matrices = len(self.adapters.names) if self.adapters is not None else 0
        return AdaptersBegun(rank=self._trainer.lora_rank, alpha=self._trainer.lora_alpha, matrices=matrices)

    # -- weights from elsewhere ------------------------------------------------------------------------------------

    def begin_with(self, weights: Mapping[str, Tensor], adapters: AdapterState | None = None) -> None:
        """Take over a policy's weights and normaliser, and adapters of them, before the first update.

        They are also what `restore_good` comes back to at first. Optimisers and critics begin as they are.

        Raises:
            RuntimeError: They are those of another policy.
            ContractError: The adapters are of others, or there is nothing here that they could become.
        """
        if self.adapters is None:
            if adapters is not None:
                raise ContractError("there are no adapters here: they begin with an update")
            self.policy.load_state_dict(weights)
        else:
            self.adapters.load_base_state_dict(weights)
            if adapters is not None:
                self.adapters.load_adapter_state(adapters)
        self._acting_normaliser = self._normaliser_now()
        self.keep_good()

    def adapters_at(self, steps_done: int) -> list[AdaptersBegun]:
        """Begin them with the first update from `lora_start_step` on: that one itself may have been given up.

        Those of step 0 were there from the beginning; the first update tells.
        """
        start = self._trainer.lora_start_step if self._trainer.lora_enabled else None
        if start is None or steps_done < max(start, 1):
            return []
        if self.adapters is None:
            return [self.begin_adapters()]
        return [self.adapters_begun()] if (start, steps_done) == (0, 1) else []

    # -- updates ---------------------------------------------------------------------------------------------------

    def update(
        self,
        batch: Batch,
        mode: StepMode,
        *,
        entropy_coefficient: float,
        progress: float,
        rng: np.random.Generator,
        observer: StepObserver = UNWATCHED,
    ) -> Updated:
        """Make one update.

        Raises:
            FloatingPointError: A loss, a gradient, or a weight after it is not finite. Weights may have moved:
                `restore_good` takes them back.
        """
        self._execution.begin_step()
        self.optimisers.begin_update()
        self.optimisers.lr_factor = mode.lr_factor
        overflows = self.optimisers.overflows
        terms = Terms(
            trainer=self._trainer,
            policy=self.policy,
            optimisers=self.optimisers,
            mode=mode,
            entropy_coefficient=entropy_coefficient,
            progress=progress,
            rng=rng,
            penalty=self._penalty(),
            observer=observer,
            computation=self.computation,
        )
        with self.adapters.dropping(rng) if self.adapters is not None else contextlib.nullcontext():
            updated = self._update(batch, terms)
        self._check_weights()
        self._acting_normaliser = self._normaliser_now()
        penalty = self._penalty()
        if penalty is not None:
            with torch.no_grad():
                updated.metrics["ewc_penalty"] = float(penalty())
        if self.optimisers.loss_scale is not None:
            updated.metrics["loss_scale"] = self.optimisers.loss_scale.scale
            updated.metrics["loss_scale_overflows"] = float(self.optimisers.overflows - overflows)
        return updated

    def _check_weights(self) -> None:
        learned = list(self.policy.named_parameters())
        if self._iql is not None:
            learned += [(f"{CRITICS}{name}", weight) for name, weight in self._iql.critics.named_parameters()]
        # Read together: each reading waits for the device.
        are_finite = torch.stack([weight.isfinite().all() for _, weight in learned]).tolist()
        if not all(are_finite):
            spoilt = learned[are_finite.index(False)][0]
            raise FloatingPointError(f"weights of {spoilt} are not finite after the update")

    # -- old tasks -------------------------------------------------------------------------------------------------

    def consolidate(self, batches: Iterable[Batch], rng: np.random.Generator) -> None:
        """Hold from now on what the experience in these batches needed of the policy.

        Args:
            batches: Of few lanes each; a lane is one sample.
            rng: All chance: which parameters are held, and what is sampled from the policy.
        """
        trainer, parameters = self._trainer, dict(self.policy.named_parameters())
        learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        names = None if trainer.ewc_fraction == 1 else choose_parameters(learning, trainer.ewc_fraction, rng)
        estimate = estimate_fisher(
            lambda batch: sampled_log_probs(self.policy, batch, rng),
            self._told(batches),
            learning,
            names=names,
        )
        self.consolidation = consolidate(
            self.consolidation, estimate.diagonal, parameters, decay=trainer.ewc_decay
        )
        if trainer.ewc_adjusts_rate:
            held = self.consolidation.fisher.values()
            mean = sum(float(fisher.sum()) for fisher in held) / sum(fisher.numel() for fisher in held)
            self.optimisers.rates.set_policy("policy", LRPolicy.EWC_ADJUSTED)
            self.optimisers.rates.set_strength("policy", trainer.ewc_lambda * mean)

    def _told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; whoever listens hears of the beginning, and of each one that is done with."""
        self.consolidating()
        for batch in batches:
            yield batch
            self.consolidating()

    def _penalty(self) -> Callable[[], Tensor] | None:
        consolidation = self.consolidation
        if consolidation is None:
            return None
        # Lambda is applied here and nowhere else.
        return lambda: self._trainer.ewc_lambda * consolidation.penalty(dict(self.policy.named_parameters()))

    def take_news(self) -> tuple[tuple[RateChanged, ...], tuple[Tampered, ...]]:
        """Changes of learning rates, and rates that somebody else had written, since this was asked last."""
        return self.optimisers.take_news()

    # -- the last good state ---------------------------------------------------------------------------------------

    def keep_good(self) -> None:
        """What there is now is good: `restore_good` comes back to it."""
        self._good = {name: tensor.clone() for name, tensor in self._living().items()}

    def restore_good(self) -> None:
        """Weights, optimisers and normalisers become those of the last good state, at first of the beginning."""
        self._load_living(self._good if self._good is not None else self._beginning())

    def _beginning(self) -> dict[str, Tensor]:
        """What a learner of this configuration begins with: a function of the configuration alone."""
        return Engine(self._trainer, self.policy.spec)._living()

    # -- what actors get -------------------------------------------------------------------------------------------

    def acting_weights(self) -> dict[str, Tensor]:
        """The policy as it was after the last update, by name.

        The normaliser goes on with every admission; a version does not, whenever it is asked for. Actors have CPUs.
        """
        weights = self.policy.state_dict() if self.adapters is None else self.adapters.merged_state_dict()
        return _on_cpu(weights) | self._acting_normaliser

    def _normaliser_now(self) -> dict[str, Tensor]:
        return {
            f"normaliser.{name}": tensor.to("cpu", copy=True)
            for name, tensor in self.policy.normaliser.state_dict().items()
        }

    # -- state -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for the CPU; not copied where it is there."""
        named = self._living()
        if self._good is not None:
            named |= {f"{GOOD}{name}": tensor for name, tensor in self._good.items()}
        if self.consolidation is not None:
            named |= {f"{OLD_TASKS}{name}": tensor for name, tensor in self.consolidation.tensors().items()}
        return _on_cpu(named)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what gave these `tensors`.

        Raises:
            ValueError: They are those of another configuration.
            RuntimeError: Likewise.
        """
        if self.adapters is None and has_adapters(tensors):
            self.begin_adapters()
        good, held = _under(GOOD, tensors), self._execution.to_device(_under(OLD_TASKS, tensors))
        self._load_living({name: t for name, t in tensors.items() if not name.startswith((GOOD, OLD_TASKS))})
        self.consolidation = Consolidation.from_tensors(held) if held else None
        self._good = {name: tensor.clone() for name, tensor in good.items()} or None

    def _living(self) -> dict[str, Tensor]:
        """What an update moves, by name."""
        policy = self.policy.state_dict() if self.adapters is None else self.adapters.own_state_dict()
        named = {f"{POLICY}{name}": tensor.detach() for name, tensor in policy.items()}
        named |= {f"{ACTING}{name}": tensor for name, tensor in self._acting_normaliser.items()}
        named |= {f"{OPTIMIZER}{name}": tensor for name, tensor in self.optimisers.tensors().items()}
        if self._iql is not None:
            for prefix, critics in ((CRITICS, self._iql.critics), (SLOW_CRITICS, self._iql.slow)):
                named |= {f"{prefix}{name}": tensor.detach() for name, tensor in critics.state_dict().items()}
        return named

    def _load_living(self, named: Mapping[str, Tensor]) -> None:
        self.policy.load_state_dict(_under(POLICY, named))
        self._acting_normaliser = {name: tensor.clone() for name, tensor in _under(ACTING, named).items()}
        self.optimisers.load_tensors(_under(OPTIMIZER, named))
        if self._iql is not None:
            self._iql.critics.load_state_dict(_under(CRITICS, named))
            self._iql.slow.load_state_dict(_under(SLOW_CRITICS, named))


def check_heads(trainer: TrainerConfig, spec: ExperienceSpec) -> None:
    """Refuse numbers of heads that the actions of a world lack; for who begins a training there.

    Raises:
        ConfigError: Naming the key, the heads that are none, and those there are.
    """
    try:
        trainer.check_heads(spec.action.heads if isinstance(spec.action, Choices) else (HEAD,))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in named.items()}


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}

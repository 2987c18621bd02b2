"""Every metric that leaves a run, as one table from which all exporters derive their names.

A metric has one *name* (`simic.trainer.policy_loss`), used as it stands for OpenTelemetry and as the scalar's name.
From it follow

* the Prometheus name: underscores for dots, base units (`…_time_ms` becomes `…_duration_seconds`, `…_memory_mb`
  becomes `…_memory_bytes`), `_total` at the end of a counter;
* the TensorBoard tag, which is a column of the table, because CleanRL's tags are not derived from anything.

Its value comes from a *source*: the key under which a learner's progress report carries it. A source that ends in a dot
is a family: `entropy.` takes `entropy.op`, `entropy.slot`, …, and what follows the dot becomes the value of its label.

A key of a report that no row takes is exported nowhere: a name becomes public by standing here. `unknown` finds such
keys, so that a test can show that none was forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from esper_simic.telemetry.catalogue_algorithms import ALGORITHMS
from esper_simic.telemetry.metric import MIB, Kind, Metric, counter, gauge, histogram

GRADIENT_NORMS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""10 makes training count as unstable, above 100 gradients are clipped harder: both are bounds."""

STEP_TIMES_MS: Final = (
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    350.0,
    500.0,
    750.0,
    1000.0,
    2000.0,
    5000.0,
)
"""The budget of a step, 500 ms, is a bound, so that the share within it is exact."""

VTRACE_TIMES_MS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 35.0, 50.0, 100.0, 200.0)
"""The budget of V-trace, 50 ms, is a bound."""


_TRAINER: Final = (
    gauge("simic.trainer.policy_loss", "policy_loss", "Loss of the policy.", tag="losses/policy_loss"),
    gauge("simic.trainer.value_loss", "value_loss", "Loss of the value.", tag="losses/value_loss"),
    gauge("simic.trainer.total_loss", "total", "The loss that was differentiated.", tag="losses/total"),
    histogram(
        "simic.trainer.grad_norm",
        "grad_norm",
        "Global gradient norm of a step, before clipping.",
        bounds=GRADIENT_NORMS,
        tag="losses/grad_norm",
    ),
    histogram(
        "simic.trainer.training_time_ms",
        "training_time_ms",
        "Duration of a training step, sampling included.",
        bounds=STEP_TIMES_MS,
        unit="ms",
        tag="time/training_ms",
    ),
    histogram(
        "simic.trainer.vtrace_time_ms",
        "vtrace_time_ms",
        "Duration of V-trace within a training step.",
        bounds=VTRACE_TIMES_MS,
        unit="ms",
        tag="time/vtrace_ms",
    ),
    gauge(
        "simic.trainer.forward_time_ms",
        "forward_time_ms",
        "Duration of the newest step's forward pass.",
        unit="ms",
        tag="time/forward_ms",
    ),
    gauge(
        "simic.trainer.backward_time_ms",
        "backward_time_ms",
        "Duration of the newest step's backward pass.",
        unit="ms",
        tag="time/backward_ms",
    ),
    gauge(
        "simic.trainer.optimizer_time_ms",
        "optimizer_time_ms",
        "Duration of the newest step's change of the weights.",
        unit="ms",
        tag="time/optimizer_ms",
    ),
    gauge(
        "simic.trainer.ewc_penalty",
        "ewc_penalty",
        "Penalty for leaving what earlier tasks need, its coefficient included.",
        tag="losses/ewc_penalty",
    ),
    gauge(
        "simic.trainer.curriculum_stage",
        "curriculum_stage",
        "Stage of the curriculum, from 0.",
        tag="charts/curriculum_stage",
    ),
    counter(
        "simic.trainer.conservative_mode",
        "conservative_entries",
        "Entries into conservative mode since the run began.",
        unit="entries",
        is_of_run=True,
    ),
    gauge(
        "simic.trainer.conservative_mode_active",
        "conservative_mode",
        "1 in conservative mode, else 0.",
        tag="charts/conservative_mode",
    ),
    gauge(
        "simic.trainer.approx_kl",
        "approx_kl",
        "Low-variance estimate of the divergence between acting and learned policy.",
        unit="nats",
        tag="losses/approx_kl",
    ),
    gauge(
        "simic.trainer.entropy",
        "entropy",
        "Mean entropy of the policy where it has a choice.",
        unit="nats",
        tag="losses/entropy",
    ),
    Metric(
        name="simic.trainer.head_entropy",
        kind=Kind.GAUGE,
        unit="nats",
        description="Mean entropy of one head of the policy where it matters.",
        source="head_entropy.",
        label="head",
        tag="losses/entropy_{}",
    ),
    gauge(
        "simic.trainer.entropy_coefficient",
        "entropy_coefficient",
        "Weight of the entropy bonus.",
        tag="charts/entropy_coefficient",
    ),
    Metric(
        name="simic.trainer.learning_rate",
        kind=Kind.GAUGE,
        unit="1",
        description="Learning rate of one optimiser.",
        source="learning_rate.",
        label="optimizer",
        tag="charts/learning_rate_{}",
    ),
    gauge(
        "simic.trainer.importance_ratio",
        "mean_rho",
        "Mean ratio of the learned to the acting policy's probabilities.",
        tag="losses/importance_ratio",
    ),
    gauge(
        "simic.trainer.importance_ratio_max",
        "max_rho",
        "Largest such ratio in the newest batch.",
        tag="losses/importance_ratio_max",
    ),
    gauge(
        "simic.trainer.clip_fraction",
        "clip_fraction",
        "Share of importance ratios that were clipped.",
        tag="losses/clipfrac",
    ),
    gauge(
        "simic.trainer.explained_variance",
        "explained_variance",
        "Share of the targets' variance that the value explains.",
        tag="losses/explained_variance",
    ),
    gauge(
        "simic.trainer.advantage",
        "mean_advantage",
        "Mean policy-gradient advantage.",
        tag="losses/advantage",
    ),
    gauge("simic.trainer.value", "mean_value", "Mean value of the batch.", tag="losses/value"),
    gauge(
        "simic.trainer.policy_lag",
        "policy_lag",
        "Mean age of fresh experience, in updates since the policy that made it.",
        unit="updates",
        tag="charts/policy_lag",
    ),
    gauge(
        "simic.trainer.policy_lag_max",
        "policy_lag_max",
        "Largest such age in the newest batch.",
        unit="updates",
        tag="charts/policy_lag_max",
    ),
    gauge(
        "simic.trainer.replay_age",
        "replay_age",
        "Mean age of the whole batch, replayed experience included.",
        unit="updates",
        tag="charts/replay_age",
    ),
    gauge(
        "simic.trainer.reward_deviation",
        "reward_deviation",
        "By what rewards are divided.",
        tag="charts/reward_deviation",
    ),
    gauge(
        "simic.trainer.loss_scale",
        "loss_scale",
        "By what losses are multiplied for gradients in half precision.",
        tag="charts/loss_scale",
    ),
    counter(
        "simic.trainer.compile_failures",
        "compile_failures",
        "Shapes for which a function is run as it is because it could not be compiled.",
        unit="shapes",
    ),
    gauge(
        "simic.trainer.device_memory_fraction",
        "memory_fraction",
        "Share of the memory budget of the device, or of the process on a CPU, that is taken.",
    ),
    Metric(
        name="simic.trainer.breaker_state",
        kind=Kind.GAUGE,
        unit="1",
        description="State of one circuit breaker: 1 closed, 2 open, 3 half open.",
        source="breaker.",
        label="breaker",
    ),
    gauge(
        "simic.trainer.convergence_time",
        "convergence_hours",
        "Training after which the mean return reached its last new height.",
        unit="h",
    ),
    Metric(
        name="simic.trainer.slo_budget_left",
        kind=Kind.GAUGE,
        unit="1",
        description="Share of one objective's error budget that is left.",
        source="slo_budget_left.",
        label="objective",
    ),
    gauge("simic.trainer.steps", "learner_step", "Updates of the run.", unit="updates"),
    gauge(
        "simic.trainer.environment_steps",
        "environment_steps",
        "Environment steps that the learner has admitted.",
        unit="steps",
    ),
    gauge(
        "simic.trainer.environment_steps_per_second",
        "steps_per_second",
        "Environment steps admitted a second, over a short window.",
        unit="steps/s",
        tag="charts/SPS",
    ),
    counter(
        "simic.trainer.refusals",
        "refused.",
        "Messages and unrolls that the learner did not take, by cause.",
        unit="messages",
        label="cause",
    ),
    gauge(
        "simic.trainer.admission_paused",
        "admission_paused",
        "1 while the disk is too full to take anything in.",
    ),
    gauge(
        "simic.trainer.quarantined",
        "quarantined",
        "Records of the learner's journal that are not learned from.",
        unit="records",
    ),
)

_EPISODES: Final = (
    gauge(
        "simic.trainer.episodic_return",
        "episodic_return",
        "Mean return of the newest training episodes.",
        tag="charts/episodic_return",
    ),
    gauge(
        "simic.trainer.behaviour_return",
        "behaviour_return",
        "Mean return of the newest episodes in which not the policy acted, but a script or a recorded run.",
        tag="charts/behaviour_return",
    ),
    gauge(
        "simic.trainer.episodic_length",
        "episodic_length",
        "Mean length of the newest training episodes.",
        unit="steps",
        tag="charts/episodic_length",
    ),
    gauge(
        "simic.trainer.episodic_accuracy",
        "episodic_accuracy",
        "Mean final accuracy of the hosts of the newest training episodes.",
        unit="percent",
        tag="charts/episodic_accuracy",
    ),
    gauge(
        "simic.trainer.episodic_parameters",
        "episodic_parameters",
        "Mean number of parameters that the newest training episodes added.",
        unit="parameters",
        tag="charts/episodic_parameters_added",
    ),
)

_BUFFER: Final = (
    gauge(
        "simic.buffer.size", "buffer_size", "Experiences held.", unit="experiences", tag="charts/buffer_size"
    ),
    Metric(
        name="simic.buffer.memory_mb",
        kind=Kind.GAUGE,
        unit="MiB",
        description="Memory of the experiences held.",
        source="buffer_bytes",
        per_source=1 / MIB,
        tag="charts/buffer_memory_mb",
    ),
    counter(
        "simic.buffer.evictions",
        "buffer_evicted",
        "Experiences dropped to keep capacity or budget.",
        unit="experiences",
    ),
    counter(
        "simic.buffer.ttl_cleanups",
        "buffer_ttl_cleanups",
        "Sweeps for experiences past their time to live.",
        unit="sweeps",
    ),
    counter(
        "simic.buffer.expired_removed",
        "buffer_expired",
        "Experiences dropped because their time to live was over.",
        unit="experiences",
    ),
    gauge(
        "simic.sampling.batch_time_ms",
        "sampling_time_ms",
        "Duration of drawing the newest batch from the buffer.",
        unit="ms",
        tag="time/sampling_ms",
    ),
)

_PROCESSES: Final = (
    gauge(
        "simic.checkpoint.step",
        "checkpoint.step",
        "Update at which the newest checkpoint stands.",
        unit="updates",
    ),
    gauge("simic.checkpoint.age", "checkpoint.age_s", "Time since the newest checkpoint.", unit="s"),
    counter(
        "simic.checkpoint.failures",
        "checkpoint.failures",
        "Checkpoints that could not be written or removed.",
        unit="checkpoints",
    ),
    gauge(
        "simic.recovery.records",
        "recovery.done",
        "Records that a recovery under way has folded.",
        unit="records",
    ),
    gauge("simic.recovery.records_in_all", "recovery.total", "Records that it has to fold.", unit="records"),
    gauge("simic.recovery.left", "recovery.seconds_left", "Time it will take at this pace.", unit="s"),
    gauge("simic.recovery.inexact", "inexact", "1 if the last recovery did not reach the state that was."),
    Metric(
        name="simic.process.memory_bytes",
        kind=Kind.GAUGE,
        unit="bytes",
        description="Resident memory of one process of the run.",
        source="memory_bytes.",
        label="process",
    ),
)

CATALOGUE: Final = (*_TRAINER, *ALGORITHMS, *_EPISODES, *_BUFFER, *_PROCESSES)
"""Every metric, in the order in which exporters show them."""

PROTOTYPE_NAMES: Final = {
    "simic.training.loss": "simic.trainer.total_loss",
    "simic.training.reward": "simic.trainer.episodic_return",
    "simic.training.iterations": "simic.trainer.steps",
    "simic.value.loss": "simic.trainer.value_loss",
    "simic.policy.loss": "simic.trainer.policy_loss",
    "simic.policy.entropy": "simic.trainer.entropy",
    "simic.param.loss": "simic.trainer.policy_loss",
}
"""Where names of the prototype went. Its loss of one parameter is part of the loss over all heads now."""

_TAG_EXCEPTIONS: Final = {"learning_rate.policy": "charts/learning_rate"}
"""CleanRL's tag of the one learning rate that it has."""

_BY_SOURCE: Final = {metric.source: metric for metric in CATALOGUE}


def find(key: str) -> tuple[Metric, str] | None:
    """The row that takes a report's key, and the value of its label (empty unless a family); None if there is none."""
    metric = _BY_SOURCE.get(key)
    if metric is not None and not metric.is_family:
        return metric, ""
    head, dot, label = key.partition(".")
    family = _BY_SOURCE.get(head + dot) if label else None
    return None if family is None else (family, label)


def tensorboard_tag(key: str) -> str:
    """The tag under which a report's key is drawn; empty if it is not."""
    found = find(key)
    if found is None:
        return ""
    metric, label = found
    return _TAG_EXCEPTIONS.get(key, metric.tag.format(label))


def unknown(keys: Iterable[str]) -> frozenset[str]:
    """Keys of a report that no row takes, and so nobody sees."""
    return frozenset(key for key in keys if find(key) is None)

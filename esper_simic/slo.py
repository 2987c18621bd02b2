"""Service level objectives: what is promised of a training, over which window, and how much of it may fail.

Every objective has a figure, a target, a window and an **error budget**: the share of the window's *time* in which the
target may be missed (0.1 % of a day is 86.4 seconds). Time in which nothing was observed is at most `SPAN_S_MAX` after
an observation; a process that was away for a night misses nothing in it. An objective is *met* while its figure is
within the target, and *violated* once the budget is used up (with no budget: while it is not met). A share of a window
counts against the whole window, also before so much time has passed, so that one bad minute after a start is a minute.

| objective | figure | target | budget, window |
|---|---|---|---|
| `step_latency` | share of recent updates slower than `training_step_budget_ms` | <= 5 % | 0.1 %, 24 h |
| `epoch_boundary` | share of recent boundaries slower than `epoch_boundary_budget_ms` | <= 5 % | 0.1 %, 24 h |
| `throughput` | experiences taken in per second, recently | >= 180 | 5 %, 24 h |
| `improvement` | share of windows of episodes in which the mean return did not fall | >= 70 % | 5 %, 7 d |
| `buffer_bytes` | bytes that the buffer holds now | <= 6 GB | 1 %, 24 h |
| `ttl_cleanup` | share of expired experiences that sweeps removed in time | >= 99 % | 1 %, 24 h |
| `conservative_entries` | entries into conservative mode | <= 2 | none, 24 h |
| `breaker_open` | share of time in which a breaker was open | <= 1 % | none, 24 h |
| `convergence` | hours until the mean return reached its last new height | <= 48 | none, 7 d |

*What nobody observes is met*, has no figure and keeps its whole budget: `ttl_cleanup` as long as no experience in the
buffer has an end of its time, and in lockstep latencies and throughput, for there no clock has a part.

*A 95th percentile is counted, not sorted*: it is at most 500 ms exactly if at most 5 % of the updates took longer, so
two numbers do for what would otherwise be a histogram.

*Memory is bounded*: a window is a ring of at most `BUCKETS` buckets, each 1 % of it; no sample is kept.

*Improvement rate.* The mean return over `improvement_window_episodes` episodes is compared with the moving average of
the windows before; it fell if it lies more than `NOISE` standard errors below. A share of windows that *rose* would
be near one half for every policy that has learned its task, and say that nothing is wrong for one that forgets slowly;
compared like this, a plateau falls in about 3 % of its windows, and a decline of half a standard error a window
is seen once the average lags by enough. A new height lies `NOISE` standard errors above the highest mean before; when
the last one was is the time of convergence, known without saying which return would be good.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

import msgspec

from esper_simic.config_safety import ObjectiveKeys
from esper_simic.safety_facts import SloFact, SloRestored, SloViolated

HOUR_S: Final = 3600.0
DAY_S: Final = 86_400.0
BUCKETS: Final = 100
SPAN_S_MAX: Final = 60.0
SLOW_SHARE_MAX: Final = 0.05
BUFFER_BYTES_MAX: Final = 6 * 10**9
NOISE: Final = 2.0
REFERENCE_WINDOWS: Final = 4
"""Windows of episodes over which the average runs that a mean return is compared with."""


class Figure(StrEnum):
    """How an objective's figure is made of what was observed, `amount` and `of`."""

    RECENT = "recent"
    """Sum of amounts over sum of `of`, in the newest bucket and the one before."""
    RATIO = "ratio"
    """The same over the whole window."""
    SUM = "sum"
    """Sum of amounts over the window."""
    SHARE = "share"
    """Sum of amounts, in seconds, over the window's length."""
    LATEST = "latest"
    """The newest amount."""


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """One objective.

    Attributes:
        figure: How its figure is made.
        target: Bound of the figure, itself allowed.
        at_least: Whether the target is a lower bound.
        budget: Share of the window's time in which it may be missed.
        window_s: Length of the window.
        eases: Whether smaller steps and more time would serve it: then its violation calls for conservative mode.
    """

    figure: Figure
    target: float
    at_least: bool = False
    budget: float = 0.0
    window_s: float = DAY_S
    eases: bool = False

    @property
    def budget_s(self) -> float:
        """Seconds of a window in which the target may be missed."""
        return self.budget * self.window_s


OBJECTIVES: Final[dict[str, Objective]] = {
    "step_latency": Objective(figure=Figure.RECENT, target=SLOW_SHARE_MAX, budget=0.001, eases=True),
    "epoch_boundary": Objective(figure=Figure.RECENT, target=SLOW_SHARE_MAX, budget=0.001),
    "throughput": Objective(figure=Figure.RECENT, target=180.0, at_least=True, budget=0.05),
    "improvement": Objective(figure=Figure.RATIO, target=0.7, at_least=True, budget=0.05, window_s=7 * DAY_S),
    "buffer_bytes": Objective(figure=Figure.LATEST, target=float(BUFFER_BYTES_MAX), budget=0.01),
    "ttl_cleanup": Objective(figure=Figure.RATIO, target=0.99, at_least=True, budget=0.01),
    "conservative_entries": Objective(figure=Figure.SUM, target=2.0),
    "breaker_open": Objective(figure=Figure.SHARE, target=0.01),
    "convergence": Objective(figure=Figure.LATEST, target=48.0, window_s=7 * DAY_S),
}
"""The objectives with the platform's numbers."""


def objectives(keys: ObjectiveKeys, buffer_bytes_max: float = BUFFER_BYTES_MAX) -> dict[str, Objective]:
    """The objectives under a configuration."""
    replace = msgspec.structs.replace
    return OBJECTIVES | {
        "throughput": replace(OBJECTIVES["throughput"], target=keys.target_throughput_exp_sec),
        "convergence": replace(OBJECTIVES["convergence"], target=keys.convergence_time_hours),
        "buffer_bytes": replace(OBJECTIVES["buffer_bytes"], target=float(buffer_bytes_max)),
    }


class Sample(msgspec.Struct, frozen=True):
    """What was observed of one objective since the last time; what the two mean, `Figure` says."""

    amount: float
    of: float = 0.0


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """Sums over one hundredth of a window, the `index`-th since the clock began."""

    index: int = 0
    amount: float = 0.0
    of: float = 0.0
    unmet_s: float = 0.0


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one objective, of JSON types.

    Attributes:
        closed: Buckets that are over, oldest first, without empty ones.
        sums: Their sums; `index` means nothing.
        newest: The bucket under way.
        latest: Newest amount; None before the first.
        observed_s: Time of the last fold; None before the first.
        is_met: Whether the figure is within the target.
        is_violated: Whether the budget is used up.
    """

    closed: tuple[Bucket, ...] = ()
    sums: Bucket = Bucket()
    newest: Bucket = Bucket()
    latest: float | None = None
    observed_s: float | None = None
    is_met: bool = True
    is_violated: bool = False


class SloReport(msgspec.Struct, frozen=True, kw_only=True):
    """How an objective stands: its figure (None before there is one), and what is left of its budget, in [0, 1]."""

    objective: str
    value: float | None
    target: float
    unmet_s: float
    budget_s: float
    budget_left: float
    is_met: bool
    is_violated: bool


def observe(
    name: str, objective: Objective, window: Window, sample: Sample | None, now_s: float
) -> tuple[Window, list[SloFact]]:
    """Fold what was observed of one objective, or that time passed.

    Args:
        name: The objective's.
        objective: The objective.
        window: As it was.
        sample: What was observed; None for nothing.
        now_s: Seconds by a clock that begins at 0 and never goes back.

    Returns:
        The window, and whether a violation began or ended.
    """
    window = _rolled(objective, window, now_s)
    if sample is not None:
        newest = window.newest
        newest = Bucket(newest.index, newest.amount + sample.amount, newest.of + sample.of, newest.unmet_s)
        window = msgspec.structs.replace(window, newest=newest, latest=float(sample.amount))
    value = figure(objective, window)
    is_met = value is None or (value >= objective.target if objective.at_least else value <= objective.target)
    before_s = now_s if window.observed_s is None else window.observed_s
    newest = window.newest
    if not is_met:
        unmet_s = newest.unmet_s + min(now_s - before_s, SPAN_S_MAX)
        newest = Bucket(newest.index, newest.amount, newest.of, unmet_s)
    unmet_s = window.sums.unmet_s + newest.unmet_s
    is_violated = unmet_s > objective.budget_s if objective.budget else not is_met
    facts: list[SloFact] = []
    if is_violated and not window.is_violated and value is not None:
        facts.append(SloViolated(objective=name, value=value, target=objective.target))
    if window.is_violated and not is_violated:
        facts.append(SloRestored(objective=name))
    changed = msgspec.structs.replace(
        window, newest=newest, observed_s=now_s, is_met=is_met, is_violated=is_violated
    )
    return changed, facts


def figure(objective: Objective, window: Window) -> float | None:
    """The objective's figure; None where nothing was observed that it could be made of."""
    newest, sums = window.newest, window.sums
    if objective.figure is Figure.LATEST:
        return window.latest
    if objective.figure is Figure.SUM:
        return sums.amount + newest.amount
    if objective.figure is Figure.SHARE:
        return (sums.amount + newest.amount) / objective.window_s
    if objective.figure is Figure.RATIO:
        return _ratio(sums, newest)
    last = window.closed[-1] if window.closed else Bucket()
    return _ratio(last if last.index == newest.index - 1 else Bucket(), newest)


def _ratio(before: Bucket, newest: Bucket) -> float | None:
    of = before.of + newest.of
    return (before.amount + newest.amount) / of if of > 0 else None


def report(name: str, objective: Objective, window: Window) -> SloReport:
    """How an objective stands."""
    unmet_s = window.sums.unmet_s + window.newest.unmet_s
    left = 1.0 - unmet_s / objective.budget_s if objective.budget else float(window.is_met)
    return SloReport(
        objective=name,
        value=figure(objective, window),
        target=objective.target,
        unmet_s=unmet_s,
        budget_s=objective.budget_s,
        budget_left=max(0.0, left),
        is_met=window.is_met,
        is_violated=window.is_violated,
    )


def _rolled(objective: Objective, window: Window, now_s: float) -> Window:
    """The window with the bucket of now as its newest, without those that have left it."""
    index = math.floor(now_s * BUCKETS / objective.window_s)
    newest = window.newest
    if index <= newest.index:
        return window
    buckets = window.closed
    if newest.amount or newest.of or newest.unmet_s:
        buckets += (newest,)
    closed = tuple(bucket for bucket in buckets if bucket.index > index - BUCKETS)
    # Summed anew, so that what has left takes no rounding error with it.
    sums = Bucket(
        amount=math.fsum(bucket.amount for bucket in closed),
        of=math.fsum(bucket.of for bucket in closed),
        unmet_s=math.fsum(bucket.unmet_s for bucket in closed),
    )
    return msgspec.structs.replace(window, closed=closed, sums=sums, newest=Bucket(index))


# -- improvement and convergence ---------------------------------------------------------------------------------------


class Improvement(msgspec.Struct, frozen=True, kw_only=True):
    """Returns of the episodes of one window, and what it will be compared with; of JSON types.

    Attributes:
        episodes: Episodes of the window under way.
        mean: Their mean return.
        squares: Sum of their squared distances from it.
        reference: Moving average of the windows before; None before the first.
        best: Highest mean that was a new height; None before the first.
        best_s: When it was reached.
    """

    episodes: int = 0
    mean: float = 0.0
    squares: float = 0.0
    reference: float | None = None
    best: float | None = None
    best_s: float = 0.0


def with_return(
    keys: ObjectiveKeys, improvement: Improvement, episode_return: float, now_s: float
) -> tuple[Improvement, bool | None]:
    """Fold one episode's return, which is finite; where it ends a window, also whether its mean held, if comparable."""
    episodes = improvement.episodes + 1
    distance = episode_return - improvement.mean
    mean = improvement.mean + distance / episodes
    squares = improvement.squares + distance * (episode_return - mean)
    if episodes < keys.improvement_window_episodes:
        return msgspec.structs.replace(improvement, episodes=episodes, mean=mean, squares=squares), None
    noise = NOISE * math.sqrt(squares / (episodes - 1) / episodes)
    before, best = improvement.reference, improvement.best
    reference = mean if before is None else before + (mean - before) / REFERENCE_WINDOWS
    changed = Improvement(reference=reference, best=best, best_s=improvement.best_s)
    if best is None or mean - noise > best:
        changed = msgspec.structs.replace(changed, best=mean, best_s=now_s)
    return changed, None if before is None else mean >= before - noise

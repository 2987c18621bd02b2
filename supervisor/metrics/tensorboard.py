"""TensorBoard scalars of a run, under CleanRL's tag names; x is the global environment step.

One writer, in the supervisor. Values come from the learner's progress reports, tags from the catalogue of
`esper_simic.telemetry`; a report that brings no new environment step writes nothing, so x only grows. TensorBoard's
writer buffers; what it holds reaches the file within `FLUSH_INTERVAL_S`, and at `close`.

A run that is resumed gets another file beside the earlier ones. Its first event (`SessionLog.START`) tells readers from
which step on it counts: what the files before it hold from there on was drawn of updates that a crash took back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

from esper_simic.errors import UnavailableError
from esper_simic.telemetry import CATALOGUE, tensorboard_tag

FLUSH_INTERVAL_S: Final = 10
"""Longest time after which a watcher sees what was written."""

TAGS: Final = {
    key: tensorboard_tag(key)
    for key in (
        *(metric.source for metric in CATALOGUE if metric.tag and not metric.is_family),
        "learning_rate.policy",
        "learning_rate.value",
    )
}
"""Tag of each metric that every run has; those with labels of their own are found by `tensorboard_tag`.

A metric without a tag is not written.
"""


class TensorBoardWriter:
    """Writes an event file into a run's `tensorboard/` directory, made if missing.

    Raises:
        UnavailableError: The file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._last_step = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(directory), flush_secs=FLUSH_INTERVAL_S)
        except OSError as error:
            raise self._unavailable(error) from error

    def write(self, environment_steps: int, metrics: Mapping[str, float], wall_time_s: float) -> None:
        """Write the metrics that have a tag, unless this step was written already.

        Args:
            environment_steps: The x of the points.
            metrics: Values by the learner's names.
            wall_time_s: When they were, in seconds since 1970-01-01 UTC.

        Raises:
            UnavailableError: What was written earlier did not reach the disk.
        """
        if environment_steps <= self._last_step:
            return
        is_first = self._last_step < 0
        self._last_step = environment_steps
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for name, value in metrics.items()
            if (tag := tensorboard_tag(name))
        ]
        begun = Event(
            wall_time=wall_time_s,
            step=environment_steps,
            session_log=SessionLog(status=SessionLog.START),
        )
        event = Event(wall_time=wall_time_s, step=environment_steps, summary=Summary(value=values))
        try:
            if is_first:
                self._writer.add_event(begun)
            self._writer.add_event(event)
        except OSError as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Write what is buffered and end the writer's thread; twice is harmless.

        Raises:
            UnavailableError: It did not reach the disk.
        """
        try:
            self._writer.close()
        except OSError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> UnavailableError:
        return UnavailableError(f"cannot write scalars to {self._directory}: {error}")

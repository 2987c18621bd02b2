"""The picture of a run: one HTML page made from its journals, in whatever state the run is.

`gather` reads, `page` draws. Nothing here imports torch but `episode`, which reads observations and is imported by
whoever wants them.
"""

from __future__ import annotations

from supervisor.report.choice import Choice, SeenEpisode, choose
from supervisor.report.gather import LEARNER, Gathered, gather
from supervisor.report.page import page

__all__ = ["LEARNER", "Choice", "Gathered", "SeenEpisode", "choose", "gather", "page"]

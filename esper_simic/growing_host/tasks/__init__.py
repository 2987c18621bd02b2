"""Tasks: the data on which hosts are trained and measured.

A task is loaded once a process and is then immutable. Its split into training and validation samples is a property of
the task, not of a run: it comes from a fixed stream, and is stratified, so every lane, run and machine measures on the
same samples. The validation samples are ordered so that any prefix of them is balanced as well.
"""

from __future__ import annotations

from esper_simic.config_environment import KINDS, Kind
from esper_simic.growing_host.tasks.checks import check_task
from esper_simic.growing_host.tasks.registry import Loader, load_task, register_task
from esper_simic.growing_host.tasks.splits import VALIDATION_SHARE, in_turns, split_task, stratified_split
from esper_simic.growing_host.tasks.task import Task

__all__ = [
    "KINDS",
    "VALIDATION_SHARE",
    "Kind",
    "Loader",
    "Task",
    "check_task",
    "in_turns",
    "load_task",
    "register_task",
    "split_task",
    "stratified_split",
]

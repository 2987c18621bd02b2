"""A character language model: predict the next letter of the names of the characters.

The text is the list of the names that Unicode 3.2 gives its characters, one a line, in the order of the code points,
without the ideographs and syllables that are only numbered or composed (CJK and Hangul). Python carries that edition,
beside the current one, because internationalised domain names are defined by it, and Unicode's stability policy lets no
name change; so the text is the same in every Python. Documentation (`pydoc_data.topics`) is better English but is no
such thing: of its 465 000 characters in 3.11.2, the topics that 3.14.7 still has word for word hold 7 000.

The text is cut into stretches, and of each four neighbouring ones one is held out. Windows lie wholly within a stretch,
so no held-out character is ever seen in training, neither as an input nor as a label; and held-out windows that the
rest of the text repeats, letter by letter, are left out.
"""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.errors import UnavailableError
from esper_simic.growing_host.tasks.splits import in_turns
from esper_simic.growing_host.tasks.task import Task

TEXT_SHA256: Final = "03ce3aea0397e841afdbafb4f732c6cb6fdca0bdb370d0a9cdbdbdcae33a3ee3"
WINDOW: Final = 32
"""Positions of a sample (L)."""

WINDOWS_PER_STRETCH: Final = 32
STRETCHES_PER_HELD_OUT: Final = 4

NUMBERED: Final = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE")


def characters() -> Task:
    """Windows of 32 characters of the names of Unicode 3.2; the label at each position is the next character."""
    text = names_text()
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != TEXT_SHA256:
        raise UnavailableError(
            f"task 'characters': the Unicode 3.2 names of this Python ({sys.implementation.name} "
            f"{sys.version.split()[0]}) have SHA-256 {found}, not {TEXT_SHA256}; it would be another task"
        )
    vocabulary, tokens = np.unique(np.array(list(text)), return_inverse=True)
    starts, stretches = window_starts(len(text))
    train, held_out = split_stretches(stretches, seeding.generator("task", "characters", "split"))
    validation = unseen(text, starts, train, held_out)
    windows = starts[:, None] + np.arange(WINDOW + 1)
    inputs, labels = tokens.astype(np.int64)[windows[:, :-1]], tokens.astype(np.int64)[windows[:, 1:]]
    return Task(
        "characters", len(vocabulary), "tokens",
        inputs[train], labels[train], inputs[validation], labels[validation],
    )  # fmt: skip


def names_text() -> str:
    """The text: 354 743 characters."""
    edition = unicodedata.ucd_3_2_0
    names = (edition.name(chr(point), "") for point in range(sys.maxunicode + 1))
    return "\n".join(name for name in names if name and not name.startswith(NUMBERED))


def window_starts(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where windows of a text start, and the stretch of each.

    A stretch holds `WINDOWS_PER_STRETCH` windows and one character more, the last window's last label. What is left at
    the end of the text is not used.
    """
    per_stretch = WINDOWS_PER_STRETCH * WINDOW + 1
    stretches = np.arange(length // per_stretch)
    starts = stretches[:, None] * per_stretch + np.arange(WINDOWS_PER_STRETCH) * WINDOW
    return starts.ravel(), np.repeat(stretches, WINDOWS_PER_STRETCH)


def split_stretches(
    stretches: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows to train on, ascending, and held-out ones, their stretches taken in turn.

    Args:
        stretches: `[N]` the stretch of each window.
        rng: Draws which of four neighbouring stretches is held out, and the order in which they are taken.
    """
    count = int(stretches.max()) + 1
    fours = np.arange(0, count, STRETCHES_PER_HELD_OUT)
    drawn = fours + rng.integers(0, STRETCHES_PER_HELD_OUT, len(fours))
    held_out = rng.permutation(drawn[drawn < count])
    turns = in_turns([rng.permutation(np.flatnonzero(stretches == stretch)) for stretch in held_out])
    return np.flatnonzero(~np.isin(stretches, held_out)), turns


def unseen(
    text: str, starts: NDArray[np.int64], train: NDArray[np.int64], held_out: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Those of the held-out windows whose `WINDOW` inputs follow each other nowhere in the training text.

    Args:
        text: The text.
        starts: `[N]` where its windows start.
        train: Windows to train on, ascending, whole stretches.
        held_out: The others, in any order; it is kept.
    """
    stretches = train.reshape(-1, WINDOWS_PER_STRETCH)
    # The separator is no character of a name, so nothing is found across two stretches.
    trained = "\0".join(text[starts[row[0]] : starts[row[-1]] + WINDOW + 1] for row in stretches)
    return held_out[[text[starts[one] : starts[one] + WINDOW] not in trained for one in held_out]]

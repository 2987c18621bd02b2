"""HTML and SVG as values: whatever is put in as text comes out as text, whoever wrote it.

Only `element` makes markup, and it escapes every string that is no `Markup`. So a run whose name is a script is a run
with an odd name.
"""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Iterable
from typing import Final

VOID: Final = frozenset({"meta", "br", "hr"})
"""Elements of HTML without an end tag."""

SHAPES: Final = frozenset({"line", "path", "rect", "circle"})
"""Elements of SVG that are closed in place when empty."""

TEXT_MAX: Final = 100_000
"""Characters of one text; of a longer one the rest is left out."""

_UNFIT: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What no HTML document may contain: control characters and halves of characters."""


class Markup(str):
    """Text that is markup already. Made by `element` and `join` alone, and of constants."""

    __slots__ = ()


Content = Markup | str | float | None | Iterable["Content"]
"""What can stand in an element: markup as it is, text escaped, numbers, nothing for None, and any of them in turn."""


def escaped(text: str) -> Markup:
    """Text as it may stand anywhere in a document, also in an attribute's quotes."""
    cut = (
        text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}\n… and {len(text) - TEXT_MAX} more characters"
    )
    return Markup(html.escape(_UNFIT.sub("\ufffd", cut), quote=True))


def join(content: Content) -> Markup:
    """Everything in turn, as one piece of markup."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return escaped(content)
    if isinstance(content, int | float):
        return Markup(number(content))
    return Markup("".join(join(part) for part in content))


def element(tag: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        tag: Its name, never from outside.
        content: What stands in it.
        attributes: By name, `_` for `-`, and one `_` at the end to avoid a word of Python's; None leaves it out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(content)
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    if tag in SHAPES and not inside:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{inside}</{tag}>")


def number(value: float) -> str:
    """A coordinate: at most two decimals, no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def note(text: Content) -> Markup:
    """A remark beside what is shown, or in its place."""
    return element("p", text, class_="note")


# Numbers for people


def fixed(value: float, digits: int) -> str:
    """With thousands separated, and a minus that is as wide as a plus."""
    text = f"{value:,.{digits}f}"
    return text.replace("-", "\u2212") if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float, digits: int) -> str:
    """As `fixed`, a positive one with its plus."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and not text.startswith("\u2212") else text


def short(value: float) -> str:
    """In a few characters, for scales: 0.05, 12.5, 340, 12k, 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}".replace("-", "\u2212")
    return f"{value:.4g}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """In its two largest units: 12 s, 4 min 10 s, 3 h 5 min, 2 d 1 h."""
    left = round(seconds)
    parts = []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def utc(at_s: float) -> str:
    """A moment, seconds since 1970-01-01 UTC; `never` for NaN."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_s)) if math.isfinite(at_s) else "never"

"""One growing host as a picture: lines of text for a terminal, or pixels for a video.

Both show the same: the chain of layers with a place for each slot, what is grafted there, in which stage and how far
blended in, and the validation accuracy over the episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from esper_simic.errors import ConfigError
from esper_simic.lifecycle import OCCUPIED, Floats, SeedStage

WIDTH: Final = 640
HEIGHT: Final = 400
"""Of the pixels."""

BAR: Final = 20
"""Characters of a full bar in the text."""

_PAPER: Final = "#ffffff"
_INK: Final = "#1b1f24"
_FAINT: Final = "#d0d7de"
_CURVE: Final = "#0969da"
STAGE_COLOURS: Final[dict[SeedStage, str]] = {
    SeedStage.DORMANT: "#ffffff",
    SeedStage.GERMINATED: "#d4e157",
    SeedStage.TRAINING: "#ffb74d",
    SeedStage.BLENDING: "#4fc3f7",
    SeedStage.HOLDING: "#9575cd",
    SeedStage.FOSSILIZED: "#4caf50",
    SeedStage.PRUNED: "#e57373",
    SeedStage.EMBARGOED: "#bdbdbd",
    SeedStage.RESETTING: "#e0e0e0",
}
"""Fill of a slot by the stage of what is in it."""


@dataclass(frozen=True, slots=True)
class SlotPicture:
    """One slot: its name, the layer behind which it sits, and what is in it (`blueprint` empty where nothing is)."""

    name: str
    layer: int
    stage: SeedStage
    blueprint: str
    alpha: float
    parameters: int

    @property
    def is_occupied(self) -> bool:
        """Whether a seed is in it."""
        return bool(OCCUPIED[self.stage])


@dataclass(frozen=True, slots=True)
class HostPicture:
    """All that is drawn of one host.

    Args:
        title: What it is: task and host.
        layers: A short name of each layer, in data-flow order.
        slots: In the order of the configuration.
        host_parameters: Parameters of the host alone.
        epoch: Epochs of the episode so far.
        horizon: Epochs of a whole episode.
        accuracy: `[n <= horizon + 1]` validation accuracy from the start of the episode, percent.
    """

    title: str
    layers: tuple[str, ...]
    slots: tuple[SlotPicture, ...]
    host_parameters: int
    epoch: int
    horizon: int
    accuracy: Floats

    @property
    def headline(self) -> str:
        """The whole state in one line."""
        added = sum(slot.parameters for slot in self.slots if slot.is_occupied)
        return (
            f"{self.title}  epoch {self.epoch}/{self.horizon}  accuracy {self.accuracy[-1]:.1f} %  "
            f"parameters {self.host_parameters} + {added}"
        )


RENDER_MODES: Final = ("ansi", "rgb_array")


def check_render_mode(mode: str | None) -> str | None:
    """A render mode, if there is such a one.

    Raises:
        ConfigError: There is none.
    """
    if mode is not None and mode not in RENDER_MODES:
        raise ConfigError(f"no render mode {mode!r}; known: {', '.join(RENDER_MODES)}", "render_mode")
    return mode


def drawn(picture: HostPicture, mode: str) -> str | NDArray[np.uint8]:
    """A picture in one of `RENDER_MODES`."""
    return as_text(picture) if mode == "ansi" else as_pixels(picture)


def as_text(picture: HostPicture) -> str:
    """Lines for a terminal, ended by a newline; plain ASCII."""
    lines = [picture.headline]
    for index, layer in enumerate(picture.layers):
        lines.append(f"  {layer}")
        lines += [f"    {_slot_line(slot)}" for slot in picture.slots if slot.layer == index]
    lines.append(f"  accuracy {_sparkline(picture.accuracy)}")
    return "\n".join(lines) + "\n"


def _slot_line(slot: SlotPicture) -> str:
    if not slot.is_occupied:
        return f"{slot.name}  {slot.stage.name.lower()}"
    filled = round(BAR * slot.alpha)
    bar = "#" * filled + "." * (BAR - filled)
    return (
        f"{slot.name}  {slot.blueprint:<14} {slot.stage.name.lower():<10} [{bar}] {slot.alpha:.2f}  "
        f"{slot.parameters} parameters"
    )


def _sparkline(accuracy: Floats) -> str:
    """One character an epoch, the newest last: a digit for the tens of a percentage, `*` for 100."""
    return "".join("*" if value >= 100 else str(int(value // 10)) for value in accuracy)


def as_pixels(picture: HostPicture) -> NDArray[np.uint8]:
    """An image, `[HEIGHT, WIDTH, 3]` uint8."""
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), picture.headline, fill=_INK, font=_font(14))
    _draw_layers(draw, picture)
    _draw_curve(draw, picture)
    return np.asarray(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


_CHAIN_TOP: Final = 40
_CHAIN_BOTTOM: Final = 210
_CURVE_TOP: Final = 230
_CURVE_BOTTOM: Final = HEIGHT - 28


def _draw_layers(draw: ImageDraw.ImageDraw, picture: HostPicture) -> None:
    """Layers from left to right on one line; the slots behind a layer hang under the arrow that leaves it."""
    column = (WIDTH - 24) / len(picture.layers)
    middle = _CHAIN_TOP + 26
    for index, layer in enumerate(picture.layers):
        left = 12 + index * column
        if index:
            draw.line((left - column * 0.3, middle, left, middle), fill=_INK, width=2)
        draw.rectangle((left, _CHAIN_TOP, left + column * 0.7, _CHAIN_TOP + 52), outline=_INK, width=2)
        draw.multiline_text(
            (left + 5, _CHAIN_TOP + 6), layer.replace(" ", "\n", 1), fill=_INK, font=_font(11)
        )
        here = [slot for slot in picture.slots if slot.layer == index]
        for place, slot in enumerate(here):
            top = _CHAIN_TOP + 62 + place * (_CHAIN_BOTTOM - _CHAIN_TOP - 62) / len(here)
            _draw_slot(draw, slot, left, top, column * 0.92)


def _draw_slot(draw: ImageDraw.ImageDraw, slot: SlotPicture, left: float, top: float, width: float) -> None:
    bottom = top + 46
    draw.rectangle((left, top, left + width, bottom), fill=_PAPER, outline=_FAINT)
    if slot.is_occupied:
        # The fill grows with alpha; a seed that is not blended in yet shows a sliver of its stage's colour.
        filled = left + width * max(slot.alpha, 0.06)
        draw.rectangle((left, top, filled, bottom), fill=STAGE_COLOURS[slot.stage])
    words = f"{slot.blueprint} {slot.alpha:.2f}" if slot.is_occupied else ""
    draw.multiline_text(
        (left + 4, top + 3), f"{slot.name}\n{slot.stage.name.lower()}\n{words}", fill=_INK, font=_font(10)
    )


def _draw_curve(draw: ImageDraw.ImageDraw, picture: HostPicture) -> None:
    """Accuracy over the episode, 0 to 100 %, one place per epoch of the horizon."""
    left, right = 44, WIDTH - 16

    def at(epoch: float, percent: float) -> tuple[float, float]:
        x = left + (right - left) * epoch / picture.horizon
        return x, _CURVE_BOTTOM - (_CURVE_BOTTOM - _CURVE_TOP) * percent / 100

    for percent in (0, 50, 100):
        draw.line((*at(0, percent), *at(picture.horizon, percent)), fill=_FAINT)
        draw.text((12, at(0, percent)[1] - 6), f"{percent}", fill=_INK, font=_font(10))
    points = [at(epoch, float(percent)) for epoch, percent in enumerate(picture.accuracy)]
    if len(points) > 1:
        draw.line(points, fill=_CURVE, width=2)
    x, y = points[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_CURVE)
    draw.text((left, _CURVE_BOTTOM + 6), "accuracy %, by epoch", fill=_INK, font=_font(10))

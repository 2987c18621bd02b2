"""The picture of a host: what the text says, and what the pixels show."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageColor

from esper_simic.growing_host.picture import (
    HEIGHT,
    STAGE_COLOURS,
    WIDTH,
    HostPicture,
    SlotPicture,
    as_pixels,
    as_text,
)
from esper_simic.lifecycle import SeedStage


def picture(*slots: SlotPicture, accuracy: tuple[float, ...] = (10.0, 45.0, 100.0)) -> HostPicture:
    return HostPicture(
        "digits, host rescue", ("conv 1->1", "linear 1->10"), slots, 75, 2, 40, np.array(accuracy)
    )


def slot(stage: SeedStage, alpha: float = 0.0, name: str = "r0c0") -> SlotPicture:
    return SlotPicture(name, 0, stage, "conv_light", alpha, 11)


def count(pixels: np.ndarray, colour: str) -> int:
    return int((pixels == np.array(ImageColor.getrgb(colour))).all(axis=2).sum())


def test_the_text_says_what_is_where() -> None:
    text = as_text(
        picture(slot(SeedStage.BLENDING, 0.5), SlotPicture("r1c0", 0, SeedStage.DORMANT, "", 0.0, 0))
    )
    head, first, seed, empty, second, curve = text.splitlines()
    assert head == "digits, host rescue  epoch 2/40  accuracy 100.0 %  parameters 75 + 11"
    assert (first.strip(), second.strip()) == ("conv 1->1", "linear 1->10")
    assert "r0c0  conv_light     blending   [##########..........] 0.50  11 parameters" in seed
    assert empty.strip() == "r1c0  dormant"
    assert curve.strip() == "accuracy 14*"
    assert text.isascii()


def test_what_is_pruned_counts_no_parameters() -> None:
    assert picture(slot(SeedStage.EMBARGOED)).headline.endswith("parameters 75 + 0")


def test_the_pixels_show_the_stage_in_its_colour_as_wide_as_alpha() -> None:
    colour = STAGE_COLOURS[SeedStage.HOLDING]
    pixels = as_pixels(picture(slot(SeedStage.HOLDING, 1.0)))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    half = as_pixels(picture(slot(SeedStage.HOLDING, 0.5)))
    assert count(half, colour) == pytest.approx(count(pixels, colour) / 2, rel=0.15)
    assert count(as_pixels(picture(slot(SeedStage.DORMANT))), colour) == 0


def test_a_seed_in_training_is_visible_although_it_is_not_blended_in() -> None:
    assert count(as_pixels(picture(slot(SeedStage.TRAINING))), STAGE_COLOURS[SeedStage.TRAINING]) > 50


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert set(STAGE_COLOURS) == set(SeedStage)
    assert len(set(STAGE_COLOURS.values())) == len(SeedStage)


def test_the_first_measurement_alone_can_be_drawn() -> None:
    assert as_pixels(picture(accuracy=(9.0,))).shape == (HEIGHT, WIDTH, 3)

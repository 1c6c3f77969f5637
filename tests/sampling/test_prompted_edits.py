"""Prompts reach every edit, and a text_diff moves images as the laws of its two texts differ.

Pixels of a "dark" image are N(-0.5, 0.1^2) and those of a "bright" one N(0.5, 0.1^2), of which the
best denoiser is known. The probability flow of a Gaussian is affine: it carries the pixel
m_1 + d to the noise of d, and that noise to the pixel m_2 + d.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.tracking.pyfunc_model import ServedModel
from tests.truth import SCHEDULE

MEANS, DEVIATION = {"dark": -0.5, "bright": 0.5, "": 0.0}, 0.1
TOKENIZER = Tokenizer.trained(["dark", "bright"] * 9, 300, 4)
ROWS = {tuple(TOKENIZER.encode([text])[0].tolist()): text for text in MEANS}
asked: list[list[str]] = []


def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """E[epsilon | x_t, text]; keeps the texts."""
    assert conditioning.tokens is not None
    asked.append([ROWS.get(tuple(row), "") for row in conditioning.tokens.tolist()])
    mean = torch.tensor([MEANS[text] for text in asked[-1]]).view(-1, 1, 1, 1)
    a = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1)
    noise = (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * DEVIATION**2 + 1 - a)
    return noise.to(x_t)


MODEL = TrainedModel(
    Denoiser(
        network,
        Parameterization.of("epsilon", SCHEDULE),
        takes=ConditioningSpec(tokenizer=TOKENIZER),
    ),
    ImageShape(8, 8, 1),
    provenance={},
)
DARK = np.random.default_rng(1).normal(63.75, 12.75, (5, 8, 8, 1)).round().astype(np.uint8)


def test_a_text_diff_moves_images_by_the_difference_of_the_means() -> None:
    """By 127.5 grey levels; each pixel keeps its distance from the mean of its text."""
    changed = MODEL.text_diff(DARK, "dark", "bright", steps=500, clip=False)
    assert np.abs(changed - DARK.astype(int) - 127.5).max() < 2
    assert np.abs(changed[2:3] - MODEL.text_diff(DARK[2:3], "dark", "bright", steps=500)).max() <= 1


def test_a_text_diff_of_equal_texts_gives_the_image_back() -> None:
    """To the grey level, with the fixed-point iterations of the inversion."""
    back = MODEL.text_diff(DARK, "dark", "dark", steps=40, iterations=6)
    assert np.abs(back.astype(int) - DARK).max() <= 1


def test_guidance_of_a_text_diff_is_for_the_sampling_alone() -> None:
    """The inversion asks for the first text only, the sampling for the second and for no text."""
    asked.clear()
    MODEL.text_diff(DARK[:1], "dark", "bright", steps=3, guidance_scale=2, negative_prompt="dark")
    assert asked[:3] == [["dark"]] * 3
    assert [sorted(texts) for texts in asked[3:]] == [["bright", "dark"]] * 3


MASK = np.arange(8) < 4
EDITS: dict[str, Callable[..., Any]] = {
    "sample": lambda **given: MODEL.sample(5, **given),
    "inpaint": lambda **given: MODEL.inpaint(
        DARK, np.tile(MASK, (8, 1)), method="replacement", **given
    ),
    "outpaint": lambda **given: MODEL.outpaint(DARK, top=4, method="replacement", **given),
    "image_to_image": lambda **given: MODEL.image_to_image(DARK, 1, **given),
    "reconstruct": lambda **given: MODEL.reconstruct(DARK, **given),
    "interpolate": lambda **given: MODEL.interpolate(3, 1, 5, **given),
}


@pytest.mark.parametrize("name", EDITS)
def test_prompts_reach_every_edit(name: str) -> None:
    """Image i has prompts[i % 2], in each window; images between two have that of the first."""
    asked.clear()
    EDITS[name](prompts=["dark", "bright"], steps=2)
    turns = ["dark", "bright", "dark", "bright", "dark"]
    windows = 2 if name == "outpaint" else 1  # of images that are larger than the model's
    expected = ["bright"] * 5 if name == "interpolate" else turns * windows
    inversion = name == "reconstruct"  # as many calls again
    assert asked == [expected] * (2 + 2 * inversion)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"prompts": []}, "prompts is empty; give one or more texts, or leave it out"),
        ({"prompts": ["a", "b\nc"]}, r"prompts cannot be used: prompt 2 holds .* U\+000A"),
        ({"prompts": "a" * 4097}, "used: prompt 1 has 4097 bytes of UTF-8; shorten it to at most"),
        ({"prompts": ["a", "b\ud800"]}, "used: prompt 2 holds half a surrogate pair"),
        ({"prompts": ["a", 3.0]}, "prompts has 3.0 as number 2; give a text"),
        (
            {"negative_prompt": "a\x00", "guidance_scale": 2},
            r"negative_prompt cannot be used: the text holds the control character U\+0000",
        ),
    ],
)
def test_a_text_that_no_caption_may_be_is_named_by_its_number(
    wrong: dict[str, Any], reason: str
) -> None:
    """In Python and in MLflow alike."""
    with pytest.raises(ValueError, match=reason):
        MODEL.sample(2, steps=2, **wrong)
    with pytest.raises(ValueError, match=reason):
        MODEL.image_to_image(DARK, 0.5, steps=2, **wrong)
    with pytest.raises(ValueError, match=reason):
        ServedModel(MODEL).predict({"num_images": 2, "steps": 2, **wrong})


def test_prompts_are_read_as_captions_are_stored() -> None:
    """In NFC and without white space around them: with the tokens of the training captions."""
    plan = MODEL._plan(MODEL.settings.overridden({"prompts": [" cafe\u0301\n"]}))
    assert plan.settings.prompts == ("caf\u00e9",)


def test_an_edit_of_two_texts_takes_no_prompts() -> None:
    """They would be a third."""
    with pytest.raises(ValueError, match="prompts are given; the texts of text_diff are from_text"):
        MODEL.text_diff(DARK, "dark", "bright", prompts=["dark"])


@pytest.mark.parametrize(
    "texts, reason",
    [
        ((3, "b"), "from_text is 3; give a text"),
        (("a", None), "to_text is None; give a text"),
        (("a\nb", "b"), r"from_text cannot be used: the text holds .* U\+000A"),
    ],
)
def test_a_text_of_a_text_diff_that_is_none_is_named(texts: tuple[Any, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MODEL.text_diff(DARK, *texts, steps=2)


def test_a_model_without_text_has_no_text_diff() -> None:
    """Said of text_diff; its caller gave no prompts."""
    without = replace(MODEL, denoiser=replace(MODEL.denoiser, takes=ConditioningSpec()))
    with pytest.raises(ValueError, match="text_diff is for models trained with text; this one was"):
        without.text_diff(DARK, "dark", "bright")


def test_cut_prompts_are_told_once_with_their_count(caplog: pytest.LogCaptureFixture) -> None:
    """Not at each call with the same prompts; another list is told again."""
    caplog.set_level(logging.WARNING)
    long = ["dark", "a dark and bright and dark image", "bright, not at all dark"]
    for _ in range(2):
        MODEL.sample(3, prompts=long, steps=1)
    (line,) = (record.message for record in caplog.records)
    assert line.startswith("2 of 3 prompts have more than text.length=4 tokens and are cut; the lo")
    MODEL.sample(3, prompts=["dark", "bright"], steps=1)
    assert len(caplog.records) == 1
    MODEL.sample(3, prompts=long[:2], steps=1)
    assert caplog.records[1].message.startswith("1 of 2 prompts have more")


def test_a_table_in_mlflow_has_rows_of_texts() -> None:
    """A missing value is named by its row."""
    pandas = pytest.importorskip("pandas")
    served = ServedModel(MODEL)
    with pytest.raises(ValueError, match="the table has no rows"):
        served.predict(pandas.DataFrame({"prompt": []}))
    with pytest.raises(ValueError, match="prompts has nan as number 2; give a text"):
        served.predict(pandas.DataFrame({"prompt": ["dark", float("nan")]}))
    asked.clear()
    drawn = served.predict(pandas.DataFrame({"prompt": ["dark", "bright"], "steps": [3, 3]}))
    assert drawn.shape == (2, 8, 8, 1)
    assert asked[0] == ["dark", "bright"]

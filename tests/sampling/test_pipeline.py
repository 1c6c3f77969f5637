"""The face that a notebook sees: uint8 in and out, the same image in any call, errors with reasons.

What the walks make of an image is held to the truth in test_editing.py and tests/diffusion.
"""

import inspect
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm_ray.config.jobs.edit import InpaintingMethod
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.low_resolution import low_resolution_size
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images

SCHEDULE = NoiseSchedule(schedules.cosine(20))
SHAPE = ImageShape(8, 8, 1)
KNOWN = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
MASK = np.arange(64).reshape(8, 8) % 3 > 0


def digits_model() -> TrainedModel:
    torch.manual_seed(0)
    network = UNet(
        UNetSpec(
            image_channels=1,
            base_channels=8,
            channel_mults=(1, 2),
            blocks_per_level=1,
            attention_factors=(2,),
            groups=4,
        )
    )
    nn.init.normal_(network.conv_out.weight, std=0.1)
    denoiser = Denoiser(network.eval(), Parameterization.of("epsilon", SCHEDULE))
    return TrainedModel(denoiser, SHAPE, provenance={})


def test_a_model_gives_image_i_whatever_the_batch_size() -> None:
    """To one grey level: convolutions sum in another order for another batch."""
    model = digits_model()
    whole = model.sample(7, steps=4, seed=5)
    parts = model.sample(7, steps=4, seed=5, batch_size=2)
    assert whole.shape == (7, 8, 8, 1)
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1
    assert np.abs(whole[:3].astype(int) - model.sample(3, steps=4, seed=5)).max() <= 1
    assert (whole != model.sample(7, steps=4, seed=6)).mean() > 0.5


def test_a_notebook_shows_a_model_as_one_line() -> None:
    model = replace(digits_model(), provenance={"checkpoint": "runs/a/step-7", "step": 7})
    assert repr(model) == "TrainedModel(runs/a/step-7, step 7, 8x8x1, cpu)"


def test_eta_and_sampler_reach_the_sampler() -> None:
    model = digits_model()
    variants = [
        model.sample(2, steps=4),
        model.sample(2, steps=4, eta=1.0),
        model.sample(2, steps=4, sampler="ancestral"),
        model.sample(2, steps=5),
    ]
    # ddim at eta 1 is the ancestral chain with fixed_small (Song et al. 2021), so 1 and 2 agree.
    assert np.abs(variants[1].astype(int) - variants[2]).max() <= 1
    assert (variants[0] != variants[1]).mean() > 0.3
    assert (variants[0] != variants[3]).mean() > 0.1


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"steps": 21}, r"steps is 21; it cannot exceed .* 20, the T that the model was trained"),
        ({"steps": 0}, "steps is 0"),
        ({"num_images": 0}, "num_images is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"labels": [1, 2]}, r"labels \[1.*\], but the model is trained without labels"),
        ({"guidance_scale": 3.0}, "guidance_scale is 3 and .* trained without labels"),
        ({"sampler": "dpm"}, "sampler is 'dpm'; choose from ddim, ancestral, dpm_solver_pp, "),
        ({"eta": 2.0}, "eta is 2.0; it must be at most 1"),
        ({"eta": "much"}, "eta is 'much'; give a number"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"seed": float("nan")}, "seed is nan; give a whole number"),
        ({"variance": "learned", "sampler": "ancestral"}, "the network predicts none"),
        ({"variance": "learned"}, "variance is 'learned' and sampler 'ddim', which has no"),
        ({"variance": "fixed_large"}, "variance is 'fixed_large', which at 2 of 20 steps adds"),
        ({"clip": False, "dynamic_quantile": 0.9}, "it is a way to clip"),
        ({"labels": "cat"}, "the model is trained without labels"),
        ({"num_images": "a"}, "num_images is 'a'; give a whole number"),
        ({"num_images": 2.5}, "num_images is 2.5; give a whole number"),
        ({"num_images": np.array([1, 2])}, r"num_images is array\(\[1, 2\]\); give a whole number"),
        ({"num_images": 10**30}, "num_images is 10+; it must be at most 4294967296"),
        ({"sampler": np.array(["ddim", "a"])}, "sampler is array.*; choose from ddim"),
        ({"clip": "false"}, "clip is 'false'; give True or False"),
        ({"guidance_scale": 10**400}, r"guidance_scale is 10+\.\.\.; give a number"),
        ({"guidance_scale": True}, "guidance_scale is True; give a number"),
        ({"labels": [True]}, r"labels is \[True\]; give whole numbers, or names"),
    ],
)
def test_a_sample_that_cannot_be_drawn_says_why(wrong: dict[str, object], reason: str) -> None:
    arguments: dict[str, object] = {"num_images": 2, "steps": 2, **wrong}
    with pytest.raises(ValueError, match=reason):
        digits_model().sample(**arguments)  # type: ignore[arg-type]


def near(one: Images, other: Images) -> bool:
    """To one grey level: convolutions sum in another order for another batch."""
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).max() <= 1)


@pytest.mark.parametrize("method", ["repaint", "replacement"])
@pytest.mark.parametrize("masks", [MASK, np.stack([MASK, ~MASK, MASK, ~MASK, MASK])])
def test_known_pixels_come_back_to_the_grey_level_whatever_the_batch(
    method: InpaintingMethod, masks: editing.Mask
) -> None:
    """And are never touched by a network that answers anything at all."""
    model = digits_model()
    whole = model.inpaint(KNOWN, masks, method=method, steps=4, resamples=2, jump_length=1)
    parts = model.inpaint(
        KNOWN,
        masks.astype(np.uint8),
        method=method,
        steps=4,
        resamples=2,
        jump_length=1,
        batch_size=3,
    )
    keep = np.broadcast_to(masks, (5, 8, 8))
    assert whole.dtype == np.uint8
    assert np.array_equal(whole[keep], KNOWN[keep])
    assert np.array_equal(parts[keep], KNOWN[keep])
    assert near(whole, parts)
    assert (whole[~keep] != KNOWN[~keep]).mean() > 0.9
    reseeded = model.inpaint(KNOWN, masks, method=method, steps=4, resamples=1, seed=1)
    assert (whole[~keep] != reseeded[~keep]).mean() > 0.5


def test_images_of_a_call_are_painted_by_noise_of_their_own() -> None:
    twins = digits_model().inpaint(KNOWN[[0, 0]], MASK, steps=4, resamples=1)
    assert (twins[0][~MASK] != twins[1][~MASK]).mean() > 0.5


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("margins", [(0, 0, 0, 3), (5, 1, 0, 2), (8, 8, 8, 8)])
def test_outpainting_leaves_the_image_where_it_lies(
    margins: tuple[int, int, int, int], batch_size: int
) -> None:
    top, bottom, left, right = margins
    outside = digits_model().outpaint(
        KNOWN[:2],
        top=top,
        bottom=bottom,
        left=left,
        right=right,
        steps=3,
        resamples=1,
        batch_size=batch_size,
    )
    assert outside.shape == (2, 8 + top + bottom, 8 + left + right, 1)
    inside = outside[:, top : top + 8, left : left + 8]
    assert np.array_equal(inside, KNOWN[:2])
    assert len(np.unique(outside)) > 40  # and around it is not one grey


def test_an_image_smaller_than_the_models_can_be_outpainted_to_its_size() -> None:
    """Without windows it is inpainting: the same noise meets the same pixels."""
    model, small = digits_model(), KNOWN[:, 2:6, 1:8]
    mask = np.zeros((8, 8), bool)
    mask[2:6, 1:8] = True
    whole = model.outpaint(small, top=2, bottom=2, left=1, steps=4, resamples=2, jump_length=1)
    assert near(whole, model.inpaint(KNOWN, mask, steps=4, resamples=2, jump_length=1))


def test_variations_are_the_same_whatever_the_batch_and_on_canvases() -> None:
    model, wide = digits_model(), np.tile(KNOWN, (1, 1, 2, 1))
    for images in (KNOWN, wide):
        whole = model.image_to_image(images, 0.6, steps=10)
        assert whole.shape == images.shape
        assert near(whole, model.image_to_image(images, 0.6, steps=10, batch_size=2))
        assert (whole != model.image_to_image(images, 0.6, steps=10, seed=1)).mean() > 0.5


@pytest.mark.parametrize("batch_size", [2, 64])
def test_interpolation_ends_at_the_samples_of_both_indices(batch_size: int) -> None:
    model = digits_model()
    way = model.interpolate(3, 1, 5, steps=4, seed=9, batch_size=batch_size)
    samples = model.sample(4, steps=4, seed=9)
    assert near(way[[0, 4]], samples[[3, 1]])
    assert (way[2] != way[0]).mean() > 0.2


class OfLabels:
    """A network that keeps the labels it is asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        self.asked.append(conditioning.labels.tolist())
        return x_t * 0.5


def test_labels_reach_every_way_to_edit() -> None:
    """Of image i labels[i % n], all in turn by default; between two images, one."""
    network = OfLabels()
    parameterization = Parameterization.of("epsilon", SCHEDULE)
    model = TrainedModel(
        Denoiser(network, parameterization, takes=ConditioningSpec(3)), SHAPE, provenance={}
    )
    edits = [
        lambda labels: model.inpaint(KNOWN, MASK, steps=2, resamples=1, labels=labels),
        lambda labels: model.inpaint(KNOWN, MASK, steps=2, method="replacement", labels=labels),
        lambda labels: model.outpaint(KNOWN[:, 1:], top=1, steps=2, resamples=1, labels=labels),
        lambda labels: model.image_to_image(KNOWN, 1, steps=2, labels=labels),
        lambda labels: model.reconstruct(KNOWN, steps=2, labels=labels),
    ]
    for edit in edits:
        for labels, expected in ((None, [0, 1, 2, 0, 1]), ([2, 0], [2, 0, 2, 0, 2])):
            network.asked.clear()
            edit(labels)
            assert network.asked[0] == network.asked[-1] == expected
    model.interpolate(5, 0, 3, steps=1)
    assert network.asked[-1] == [2, 2, 2]
    model.interpolate(5, 0, 3, steps=1, label=1)
    assert network.asked[-1] == [1, 1, 1]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"mask": MASK[:7]}, "mask is 7 x 8 and the images 8 x 8"),
        ({"mask": np.stack([MASK, MASK])}, "mask is 2 x 8 x 8 and the images 8 x 8"),
        ({"mask": MASK * np.uint8(255)}, "mask holds 255; it is True or 1 where a pixel is known"),
        ({"mask": MASK | True}, "True everywhere, so nothing is to be painted"),
        ({"mask": MASK & False}, "False everywhere, so all of it is to be painted"),
        ({"images": KNOWN[0]}, r"images are uint8 \[8, 8, 1\]; give uint8 \[N, H, W, 1\]"),
        ({"images": KNOWN[:0]}, r"images are uint8 \[0, 8, 8, 1\]"),
        ({"images": KNOWN / 255}, r"images are float64 \[5, 8, 8, 1\]"),
        ({"images": KNOWN.repeat(3, -1)}, r"images are uint8 \[5, 8, 8, 3\]"),
        (
            {"images": KNOWN[:, :6], "mask": MASK[:6]},
            r"are 6 x 8 \(height x width\); the model edits",
        ),
        ({"labels": [1]}, r"labels \[1.*\], but the model is trained without labels"),
        ({"steps": 21}, "steps is 21"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"resamples": 0}, "resamples is 0; it must be at least 1"),
        (
            {"method": "redraw"},
            "method is 'redraw'; choose from auto, conditioned, repaint, replacement",
        ),
    ],
)
def test_what_cannot_be_inpainted_says_why(wrong: dict[str, object], reason: str) -> None:
    arguments: dict[str, object] = {"images": KNOWN, "mask": MASK, "steps": 2, **wrong}
    with pytest.raises(ValueError, match=reason):
        digits_model().inpaint(**arguments)  # type: ignore[arg-type]


def test_what_else_cannot_be_edited_says_why() -> None:
    model = digits_model()
    with pytest.raises(ValueError, match="top, bottom, left and right are 0"):
        model.outpaint(KNOWN, steps=2)
    with pytest.raises(ValueError, match="left is -1; it must be at least 0"):
        model.outpaint(KNOWN, top=3, left=-1, steps=2)
    with pytest.raises(
        ValueError, match=r"are 7 x 4 \(height x width\); the model edits images of at least 8 x 8"
    ):
        model.outpaint(KNOWN[:, :4, :4], top=3, steps=2)
    for strength in (0, 1.5):
        with pytest.raises(ValueError, match=f"strength is {strength}"):
            model.image_to_image(KNOWN, strength, steps=2)
    with pytest.raises(ValueError, match=r"num_images is 1; .* at least 2"):
        model.interpolate(0, 1, 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.interpolate(0, 1, 2, steps=2, batch_size=0)


ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    1.5,
    "a",
    b"a",
    "",
    (),
    [],
    [None],
    [[1], [1, 2]],
    {},
    {"a": 1},
    object(),
    float("nan"),
    float("inf"),
    10**400,
    10**30,
    np.array([1, 2]),
    np.zeros((2, 3)),
    np.array("a"),
    torch.zeros(0),
    torch.zeros(2, 8, 8, 1).bfloat16(),
    1j,
    len,
    Path("a.png"),
)


@pytest.mark.parametrize(
    "method",
    [
        "sample",
        "inpaint",
        "outpaint",
        "image_to_image",
        "interpolate",
        "reconstruct",
        "with_settings",
    ],
)
def test_every_argument_of_any_value_is_taken_or_named_in_one_line(method: str) -> None:
    """No method lets Python's own error through, whichever argument is wrong in whichever way."""
    model = digits_model().with_settings(steps=1, sampler="ddim")
    call = getattr(model, method)
    fitting: dict[str, object] = {
        "num_images": 2,
        "images": KNOWN[:1],
        "mask": MASK,
        "top": 1,
        "strength": 1,
        "first": 0,
        "last": 1,
        "resamples": 1,
        "jump_length": 1,
    }
    names = [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    given = {name: fitting[name] for name in names if name in fitting}
    settings = [field.name for field in fields(model.settings)]
    for name in [*names, *settings]:
        for value in ODD:
            if name in ("resamples", "iterations") and isinstance(value, int) and value > 1:
                continue  # walks for as long as the caller waits
            if name == "on_step" and callable(value):
                continue  # the caller's own function raises its own errors
            try:
                call(**{**given, name: value})
            except ValueError as error:
                message = str(error)
                assert "\n" not in message, (name, value)
                assert name.rstrip("s") in message, (name, value)
                assert "truth value" not in message, (name, value)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=15)
def test_every_edit_takes_images_that_are_not_square(
    tall: int, wide: int, more: int, wider: int
) -> None:
    height, width = 2 * tall, 2 * wide
    model = replace(digits_model(), image_shape=ImageShape(height, width, 1)).with_settings(steps=2)
    assert model.sample(2).shape == (2, height, width, 1)
    assert model.interpolate(0, 1, 3).shape == (3, height, width, 1)
    shape = 2, height + more, width + wider, 1
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mask = np.arange(shape[1] * shape[2]).reshape(shape[1:3]) % 3 > 0
    painted = model.inpaint(images, mask, resamples=1)
    assert (painted == images)[:, mask].all()
    assert model.image_to_image(images, 1).shape == shape
    assert model.reconstruct(images).shape == shape
    larger = model.outpaint(images, left=3, resamples=1)
    assert (larger[:, :, 3:] == images).all()
    with pytest.raises(ValueError, match=f"edits images of at least {height} x {width}: enlarge"):
        model.image_to_image(images[:, : height - 1], 1)


def test_a_dit_samples_with_guidance_and_edits_larger_images_in_windows_of_its_size() -> None:
    torch.manual_seed(0)
    network = DiT(DiTSpec((4, 6), 1, depth=1, hidden_size=8, heads=2, num_classes=3)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    takes = ConditioningSpec(num_classes=3)
    denoiser = Denoiser(network, Parameterization.of("epsilon", SCHEDULE), takes=takes)
    model = TrainedModel(denoiser, ImageShape(4, 6, 1), provenance={}).with_settings(steps=3)
    unguided = model.sample(3)
    assert unguided.shape == (3, 4, 6, 1)
    assert (model.sample(3, guidance_scale=4) != unguided).any()
    images, mask = KNOWN[:2], MASK  # 8 x 8
    painted = model.inpaint(images, mask, resamples=1, guidance_scale=2)
    assert (painted == images)[:, mask].all()
    assert model.image_to_image(images, 0.5).shape == images.shape
    assert model.reconstruct(images).shape == images.shape
    assert (model.outpaint(images, left=3, resamples=1)[:, :, 3:] == images).all()


@given(st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))
def test_images_that_are_not_square_are_enlarged_in_their_proportions(
    pixels: int, height: int, width: int
) -> None:
    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.low_resolution is not None
        return conditioning.low_resolution

    takes = ConditioningSpec(low_resolution_pixels=pixels)
    denoiser = Denoiser(network, Parameterization.of("x_0", SCHEDULE), takes=takes)
    model = TrainedModel(denoiser, ImageShape(height, width, 1), provenance={})
    h, w = low_resolution_size(height, width, pixels)
    assert min(h, w) == pixels
    assert abs(h / w * width / height - 1) <= 0.5 / pixels
    grey = np.full((1, h, w, 1), 100, np.uint8)
    assert (model.enlarge(grey, steps=2) == 100).all()
    assert model.enlarge(grey, steps=2).shape == (1, height, width, 1)


def test_an_image_is_enlarged_by_a_network_that_sees_it() -> None:
    """One that answers with what it is shown: each image comes back large, of its own grey."""

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.low_resolution is not None
        return conditioning.low_resolution

    parameterization = Parameterization.of("x_0", SCHEDULE)
    denoiser = Denoiser(network, parameterization, takes=ConditioningSpec(low_resolution_pixels=2))
    model = TrainedModel(denoiser, SHAPE, provenance={})
    levels = np.array([0, 100, 255], np.uint8)
    small = np.broadcast_to(levels.reshape(3, 1, 1, 1), (3, 2, 2, 1))
    large = model.enlarge(small.copy(), steps=3, batch_size=2)
    assert large.shape == (3, 8, 8, 1)
    assert (large == levels.reshape(3, 1, 1, 1)).all()
    with pytest.raises(ValueError, match=r"images are 3 x 2; this model enlarges those of 2 x 2"):
        model.enlarge(np.zeros((1, 3, 2, 1), np.uint8), steps=3)
    with pytest.raises(ValueError, match="does not enlarge images; train one with objective"):
        digits_model().enlarge(small.copy(), steps=3)


@pytest.mark.parametrize("classes", [10, 0])
def test_a_model_without_labels_takes_those_of_its_guidance_classifier(classes: int) -> None:
    """Every call takes labels; ValueError without a guidance model and for unknown classes.

    A guidance model made in a notebook may not say how many it knows: 0.
    """
    asked: list[list[int]] = []

    def guidance_model(denoise: Denoise, conditioning: Conditioning) -> Denoise:
        labels = conditioning.labels
        asked.append([] if labels is None else labels.tolist())
        return denoise

    plain = digits_model()
    guided = replace(
        plain,
        denoiser=replace(plain.denoiser, guidance_model=guidance_model, guidance_classes=classes),
    )
    guided.sample(3, steps=2, labels=[7, 1])
    guided.inpaint(KNOWN[:2], MASK, steps=2, resamples=1, labels=[7])
    assert asked == [[7, 1, 7], [7, 7]]
    if classes:
        with pytest.raises(ValueError, match="labels has 10; the model knows 0 to 9"):
            guided.sample(1, steps=2, labels=[10])
    with pytest.raises(ValueError, match="the model is trained without labels"):
        plain.sample(1, steps=2, labels=[7])


@pytest.mark.parametrize(
    "method, calls",
    [("repaint", 10), ("replacement", 4)],  # repaint: 4 + 3 repetitions of 2 steps, jump_length 2
)
def test_an_edit_shows_its_steps_and_is_not_changed_by_that(
    method: InpaintingMethod, calls: int
) -> None:
    model, seen = digits_model(), list[tuple[int, tuple[int, ...]]]()

    def show(t: int, x_t: Tensor, x_0: Tensor) -> None:
        seen.append((t, tuple(x_0.shape)))
        assert model.preview(x_0).shape == (5, 8, 8, 1)

    arguments: dict[str, object] = {"method": method, "steps": 4}
    arguments |= {"resamples": 4, "jump_length": 2}
    plain = model.inpaint(KNOWN, MASK, **arguments)  # type: ignore[arg-type]
    shown = model.inpaint(KNOWN, MASK, on_step=show, **arguments)  # type: ignore[arg-type]
    assert np.array_equal(plain, shown)
    assert len(seen) == calls
    assert {shape for _, shape in seen} == {(5, 1, 8, 8)}
    seen.clear()
    model.image_to_image(KNOWN, 0.5, steps=4, on_step=show)
    assert [t for t, _ in seen] == [
        t for t in model.with_settings(steps=4).timesteps if 0 < t <= 10
    ]

"""Laws of the masks that an inpainting model is trained with."""

import hashlib
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.training.inpainting_masks import RECTANGLES, known_mask

COUNT = 800


def is_rectangle(mask: Tensor) -> bool:
    """Whether the True pixels of mask [H, W] fill their bounding box."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return False
    box = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    return bool(box.all())


def pieces(mask: Tensor) -> int:
    """The number of parts of mask [H, W] whose True pixels touch, also at a corner."""
    left, count = {(int(i), int(j)) for i, j in mask.nonzero()}, 0
    while left:
        count += 1
        todo = [left.pop()]
        while todo:
            i, j = todo.pop()
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            todo += near
    return count


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_a_mask_is_a_function_of_seed_step_and_position(
    seed: int, step: int, at: list[int], height: int, width: int
) -> None:
    """Whatever else is in the call; in each mask some pixel is to be painted."""
    masks = known_mask(seed, step, torch.tensor(at), height, width)
    assert masks.shape == (len(at), 1, height, width)
    assert masks.dtype == torch.bool
    assert not masks.flatten(1).all(1).any()
    for row, position in enumerate(at):
        alone = known_mask(seed, step, torch.tensor([position]), height, width)
        assert torch.equal(alone[0], masks[row])


def test_seed_and_step_draw_anew() -> None:
    at = torch.arange(50)
    first, *others = (known_mask(seed, step, at, 16, 16) for seed, step in ((0, 0), (1, 0), (0, 1)))
    for other in others:
        assert (first != other).flatten(1).any(1).float().mean() > 0.8  # not where all is unknown


def test_a_quarter_each_is_of_nothing_margins_rectangles_and_strokes() -> None:
    """A mask is told by its form: of nothing, of one rectangle, or unknown in one part or more."""
    masks = known_mask(5, 7, torch.arange(COUNT), 24, 32)[:, 0]
    kinds = {"nothing": 0, "rectangle": 0, "other": 0}
    for mask in masks:
        kind = "rectangle" if is_rectangle(mask) else "other"
        kinds["nothing" if not mask.any() else kind] += 1
        assert pieces(~mask) <= max(RECTANGLES, 2)  # a stroke is in one piece, margins in two
    error = 4 * math.sqrt(COUNT * 0.25 * 0.75)
    assert abs(kinds["nothing"] - COUNT / 4) < error
    # A stroke or a hole that reaches from edge to edge at an edge leaves a rectangle as well.
    assert -error < kinds["rectangle"] - COUNT / 4 < error + 0.02 * COUNT
    unknown = 1 - masks.flatten(1).float().mean(1)
    partly = unknown[unknown < 1]
    assert 0.2 < partly.mean() < 0.6
    assert partly.min() < 0.05
    assert partly.max() > 0.75


def test_masks_know_no_direction() -> None:
    """Each pixel is known as often as its mirror images, to four standard errors."""
    share = known_mask(1, 0, torch.arange(4 * COUNT), 16, 16).double().mean(0)[0]
    error = 4 * math.sqrt(0.25 / (4 * COUNT)) * math.sqrt(2)
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < error * 1.3


def test_the_masks_of_a_seed_stay_as_they_are() -> None:
    """Runs that go on draw as they began, on any machine: all is computed in integers."""
    masks = torch.cat([known_mask(3, step, torch.arange(64), 16, 24) for step in (0, 9)])
    digest = hashlib.sha256(masks.numpy().tobytes()).hexdigest()
    assert digest[:16] == "7f6587aea50fe6ad"

"""Apply a convolutional network to a large canvas tile by tile, in bounded memory."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ddpm_ray.diffusion.inpainting import window_starts


def in_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    size: int,
    overlap: int,
    scale: tuple[int, int] = (1, 1),
) -> Tensor:
    """function(x) for a canvas x [B, C, H, W], from tiles that overlap and are blended.

    `scale` is (pixels of x, pixels of the result) per unit, as (1, 8) for a decoder; `size` and
    `overlap` are in units. A tile has `size` units a side, or the canvas's if that is less;
    neighbours share at least `overlap`. Since results are wrong near a cut edge, the weight of a
    tile is 0 in the outer quarter of an overlap, 1 in the inner quarter, and linear in between. The
    result equals that of the whole canvas, to rounding, for a network whose receptive field reaches
    no further than a quarter of the overlap. It differs for networks with group norms or attention,
    which see the whole canvas but only one tile here.

    Raises ValueError unless 1 <= overlap < size.
    """
    if not 1 <= overlap < size:
        raise ValueError(f"overlap is {overlap} for tiles of {size}; it lies from 1 to size - 1")
    per_in, per_out = scale
    lengths = [side // per_in for side in x.shape[-2:]]
    rows, columns = (_spans(length, size, overlap) for length in lengths)
    if len(rows) == len(columns) == 1:
        return function(x)
    weights = [_weights(spans, overlap, per_out).to(x.device) for spans in (rows, columns)]
    total: Tensor | None = None
    for (row, down), (column, across) in product(
        zip(rows, weights[0], strict=True), zip(columns, weights[1], strict=True)
    ):
        tile = function(x[..., _pixels(row, per_in), _pixels(column, per_in)])
        if total is None:
            height, width = (length * per_out for length in lengths)
            total = tile.new_zeros(*tile.shape[:2], height, width)
        part = (..., _pixels(row, per_out), _pixels(column, per_out))
        total[part] += tile * (down[part[1], None] * across[part[2]]).to(tile)
    assert total is not None
    return total


def _spans(length: int, size: int, overlap: int) -> list[range]:
    """The units of each tile along one axis."""
    if length <= size:
        return [range(length)]
    return [range(start, start + size) for start in window_starts(length, size, overlap)]


def _pixels(span: range, per_unit: int) -> slice:
    return slice(span.start * per_unit, span.stop * per_unit)


def _weights(spans: list[range], overlap: int, per_unit: int) -> Tensor:
    """The weight of each tile at each pixel of one axis, [tiles, pixels] float64; the sum is 1."""
    end, quarter = spans[-1].stop * per_unit, overlap * per_unit / 4
    centres = torch.arange(end, dtype=torch.float64) + 0.5
    weights = torch.ones(len(spans), end, dtype=torch.float64)
    for weight, span in zip(weights, spans, strict=True):
        inside = _pixels(span, per_unit)
        for cut, distance in (
            (inside.start > 0, centres - inside.start),
            (inside.stop < end, inside.stop - centres),
        ):
            if cut:
                weight *= ((distance - quarter) / (2 * quarter)).clamp(0, 1)
    return weights / weights.sum(0)

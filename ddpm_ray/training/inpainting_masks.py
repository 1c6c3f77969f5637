"""Masks for the training of inpainting models, drawn by (seed, step, position).

There are four kinds of masks, a quarter of the masks each: all pixels are unknown (generation); a
rectangle is known, with unknown margins on 1 to 4 sides (outpainting); 1 to 3 rectangles are
unknown; a brush stroke of 1 to 4 straight pieces is unknown. Because of the first kind, the model
can also draw whole images, as Stable Diffusion's inpainting models can. Masks are computed in
integers, so they are the same on every device.
"""

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Purpose, Step, uniform_float

KINDS = 4
RECTANGLES = 3  # at most
PIECES = 4  # of a stroke, at most
# Random numbers of a mask: the kind, then those of margins, rectangles and stroke.
_NUMBERS = 1 + 5 + (1 + 4 * RECTANGLES) + (2 + 2 * (PIECES + 1))


def known_mask(seed: int, step: Step, positions: Tensor, height: int, width: int) -> Tensor:
    """Masks bool [b, 1, height, width], True where a pixel is known; at least one is not.

    Row i depends only on seed, step and positions[i].
    """
    uniform = uniform_float(seed, Purpose.INPAINTING_MASK, step, positions, (_NUMBERS,))
    numbers = _Numbers(uniform.double())
    kind = numbers.below(KINDS)
    rows = torch.arange(height, device=positions.device).view(1, -1, 1)
    columns = torch.arange(width, device=positions.device).view(1, 1, -1)
    unknown = (
        _margins(numbers, rows, columns),
        _rectangles(numbers, rows, columns),
        _stroke(numbers, rows, columns),
    )
    chosen = kind == 0
    for number, one in enumerate(unknown, start=1):
        chosen = chosen | (kind == number) & one
    return ~chosen.expand(-1, height, width).unsqueeze(1)


class _Numbers:
    """Uniform random numbers [b, n] in [0, 1), of which each call takes the next column."""

    def __init__(self, uniform: Tensor) -> None:
        self._columns = iter(uniform.unbind(1))

    def below(self, high: int | Tensor) -> Tensor:
        """Integers int64 [b, 1, 1] in 0..high-1."""
        return (next(self._columns).view(-1, 1, 1) * high).long()

    def side(self, length: int) -> Tensor:
        """Integers int64 [b, 1, 1] from an eighth to three quarters of `length`, at least 1."""
        least = max(1, length // 8)
        return least + self.below(max(1, 3 * length // 4 - least + 1))


def _margins(numbers: _Numbers, rows: Tensor, columns: Tensor) -> Tensor:
    """Margins of up to half of the image on a subset of its four sides, bool [b, H, W]."""
    sides = 1 + numbers.below(15)  # one bit for each
    height, width = rows.shape[1], columns.shape[2]
    unknown = sides < 0
    for bit, (places, length) in enumerate(
        ((rows, height), (rows.flip(1), height), (columns, width), (columns.flip(2), width))
    ):
        margin = 1 + numbers.below(max(1, (length - 1) // 2))
        unknown = unknown | (sides >> bit & 1 > 0) & (places < margin)
    return unknown


def _rectangles(numbers: _Numbers, rows: Tensor, columns: Tensor) -> Tensor:
    """1 to RECTANGLES rectangles within the image, bool [b, H, W]."""
    count = 1 + numbers.below(RECTANGLES)
    unknown = count < 0
    for number in range(RECTANGLES):
        inside = number < count
        for places in (rows, columns):
            length = places.numel()
            side = numbers.side(length)
            start = numbers.below(length - side + 1)
            inside = inside & (places >= start) & (places < start + side)
        unknown = unknown | inside
    return unknown


def _stroke(numbers: _Numbers, rows: Tensor, columns: Tensor) -> Tensor:
    """All pixels near a line of 1 to PIECES straight pieces, bool [b, H, W].

    The line's corners are pixels; its width is a sixteenth to a quarter of the shorter side.
    """
    count = 1 + numbers.below(PIECES)
    shorter = min(rows.numel(), columns.numel())
    least = max(1, shorter // 16)
    diameter = least + numbers.below(max(1, shorter // 4 - least + 1))
    y, x = numbers.below(rows.numel()), numbers.below(columns.numel())
    unknown = count < 0
    for number in range(PIECES):
        end_y, end_x = numbers.below(rows.numel()), numbers.below(columns.numel())
        near = _near(rows - y, columns - x, end_y - y, end_x - x, diameter)
        unknown = unknown | (number < count) & near
        y, x = end_y, end_x
    return unknown


def _near(down: Tensor, right: Tensor, end_y: Tensor, end_x: Tensor, diameter: Tensor) -> Tensor:
    """Whether (down, right) is within diameter / 2 of the piece from (0, 0) to (end_y, end_x).

    With p the point, e the end and s = p.e clamped to 0..|e|^2, the squared distance times |e|^2 is
    |p|^2 |e|^2 - 2 s p.e + s^2: integers below 2^63 for sides up to 16,384.
    """
    length = (end_y * end_y + end_x * end_x).clamp(min=1)  # |e|^2; 1 if the piece is a point
    along = down * end_y + right * end_x
    reached = along.clamp(min=0).minimum(length)
    squared = (down * down + right * right) * length - 2 * reached * along + reached * reached
    return 4 * squared <= diameter * diameter * length

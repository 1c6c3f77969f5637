"""The conditioning of a network: all of its inputs other than (x_t, t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

NO_LABEL = -1  # the label of an image without a label
NO_TEXT = -1  # each token of an image without a text


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Inputs of a network in addition to (x_t, t), one row per image; None: not given.

    `null` removes what classifier-free guidance amplifies: labels, texts and image embeddings. The
    images stay: without them the network would solve another task. Raises ValueError if the inputs
    are for different numbers of images. An encoded text cannot be removed: encode after `null` and
    `drop`.
    """

    labels: Tensor | None = None  # int64 [B], NO_LABEL for an image without one
    estimate: Tensor | None = None  # [B, C, H, W], an earlier estimate of x_0 (self-conditioning)
    low_resolution: Tensor | None = None  # [B, C, H, W], upsampled to the size of x_t
    known: Tensor | None = None  # [B, C + 1, H, W], see `known_part`
    tokens: Tensor | None = None  # int64 [B, L], of texts; a row of NO_TEXT: none
    text_states: Tensor | None = None  # [B, L, W], the encoded tokens, in place of these
    text_pooled: Tensor | None = None  # [B, W], likewise
    embedding: Tensor | None = None  # [B, D], of an image, of length 1; a row of zeros: none

    def __post_init__(self) -> None:
        counts = {name: len(tensor) for name, tensor in self._given().items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ValueError(f"inputs for different numbers of images ({found}); give B of each")

    @property
    def batch_size(self) -> int | None:
        """B; None if nothing is given, which fits any batch."""
        return next((len(tensor) for tensor in self._given().values()), None)

    @property
    def signature(self) -> tuple[tuple[str, torch.dtype, torch.Size], ...]:
        """Name, type and shape of a row of each given input: `concat` needs equal ones."""
        return tuple((name, one.dtype, one.shape[1:]) for name, one in self._given().items())

    @property
    def images(self) -> list[Tensor]:
        """The given images [B, ., H, W], in the order in which networks concatenate them to x_t."""
        images = self.estimate, self.low_resolution, self.known
        return [image for image in images if image is not None]

    def null(self) -> Conditioning:
        """Remove labels, texts and embeddings: the input of the unconditional prediction."""
        embedding = None if self.embedding is None else torch.zeros_like(self.embedding)
        return replace(self._replaced(torch.full_like), embedding=embedding)

    def drop(self, chosen: Tensor) -> Conditioning:
        """Remove labels and texts where `chosen` [B] is True; the other images keep them."""

        def dropped(given: Tensor, none: int) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (given.ndim - 1)), none, given)

        return self._replaced(dropped)

    def drop_embedding(self, chosen: Tensor) -> Conditioning:
        """Remove the image embedding where `chosen` [B] is True."""
        if self.embedding is None:
            return self
        return replace(self, embedding=self.embedding.masked_fill(chosen[:, None], 0.0))

    def concat(self, other: Conditioning) -> Conditioning:
        """The conditioning of this batch followed by `other`.

        Raises ValueError for an input that only one of them has.
        """
        mine, theirs = self._given(), other._given()
        if alone := sorted(mine.keys() ^ theirs.keys()):
            raise ValueError(
                f"{alone[0]} is given for one of two batches; give it for both or for neither"
            )
        return Conditioning(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})

    def take(self, places: Tensor) -> Conditioning:
        """The rows at these places of the batch, int64 [N]."""
        return self._map(lambda tensor: tensor[places])

    def repeat(self, count: int) -> Conditioning:
        """The conditioning of the batch repeated `count` times, as a whole."""
        return self._map(lambda tensor: torch.cat([tensor] * count))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Conditioning:
        """Copy to `device`; `non_blocking` is that of `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _replaced(self, change: Callable[[Tensor, int], Tensor]) -> Conditioning:
        """The same with labels and tokens changed by `change`, which gets their value for none."""
        labels, tokens = self.labels, self.tokens
        if self.text_states is not None:
            raise ValueError("the text is encoded, and cannot be removed: give its tokens")
        return replace(
            self,
            labels=None if labels is None else change(labels, NO_LABEL),
            tokens=None if tokens is None else change(tokens, NO_TEXT),
        )

    def _given(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self._given().items()})


def known_part(x_0: Tensor, known: Tensor) -> Tensor:
    """Return x_0 [B, C, H, W] where `known` [B or 1, 1, H, W] is True, else 0, and the mask.

    The result is [B, C + 1, H, W]; its last channel is 1 where x_0 is known. All zeros mean that
    nothing is known. (The inputs of the inpainting models of GLIDE, Nichol et al. 2021,
    arXiv:2112.10741, and of Stable Diffusion.)
    """
    mask = known.expand(len(x_0), 1, *x_0.shape[2:])
    return torch.cat([torch.where(mask, x_0, 0), mask.to(x_0)], dim=1)


UNCONDITIONAL = Conditioning()
Network: TypeAlias = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t [B, C, ...], t [B], conditioning of B images) -> model output [B, C or 2C, ...]."""

"""Conditioning as inputs of a network: labels and texts as vectors, images as channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.text_encoder import TextInput


def text_inputs(
    text: TextInput | None, labels: nn.Embedding | None, conditioning: Conditioning, t: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the vectors of the texts [B, L, W], and what is added to the embedding of t [B, E].

    Each is None where the network has no such input. Raises ValueError for labels or texts that the
    network does not take.
    """
    added = label_embedding(labels, conditioning.labels, t)
    if text is None:
        if conditioning.tokens is not None or conditioning.text_states is not None:
            raise ValueError(
                "a text is given, but the network takes none; build it with text, or leave it out"
            )
        return None, added
    states, pooled = text(conditioning, len(t))
    return states, pooled if added is None else pooled + added


def label_embedding(table: nn.Embedding | None, labels: Tensor | None, t: Tensor) -> Tensor | None:
    """The embedding [B, E] of each label; None for a network without classes (`table` is None).

    The last row of `table` is the embedding of NO_LABEL, which all images of t [B] have if `labels`
    is None. Raises ValueError for labels without a table.
    """
    if table is None:
        if labels is not None:
            raise ValueError(
                "labels are given, but num_classes is 0: the network has no classes; build it "
                "with num_classes, or leave labels out"
            )
        return None
    null = table.num_embeddings - 1
    embedding: Tensor = table(
        torch.full_like(t, null, dtype=torch.int64)
        if labels is None
        else torch.where(labels < 0, null, labels)
    )
    return embedding


def with_images(x_t: Tensor, images: Sequence[Tensor], channels: int) -> Tensor:
    """x_t [B, C, H, W] concatenated with conditioning images, 0 if there are none.

    Returns [B, C + channels, H, W]. Raises ValueError for images with another number of channels in
    all, or of another size.
    """
    if not images:
        return F.pad(x_t, (0, 0, 0, 0, 0, channels)) if channels else x_t
    fits = sum(image.shape[1] for image in images) == channels
    if not fits or any(image.shape[2:] != x_t.shape[2:] for image in images):
        found = " and ".join(str(list(image.shape)) for image in images)
        raise ValueError(
            f"conditioning images are {found} for x_t {list(x_t.shape)}; the network takes "
            f"condition_channels {channels} in all, of x_t's height and width"
        )
    return torch.cat([x_t, *images], dim=1)

"""Conditioning as inputs of a network: images as channels, everything else as vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.layers import zero_init
from ddpm_ray.models.text_encoder import TextInput

CONTEXT_VECTORS = 4  # of an image embedding, after those of a text (DALL-E 2)


class EmbeddingInput(nn.Module):
    """An image embedding as an input: added to the embedding of t, and as vectors to attend to.

    (Ramesh et al. 2022, "DALL-E 2", arXiv:2204.06125, section 2.1.) The first projection is 0 at
    first, so that a network that was trained without embeddings can continue with them. Without a
    `text_width` there are no vectors. A row of zeros, which no image has, stands for none.
    """

    def __init__(self, width: int, embedding_width: int, text_width: int | None) -> None:
        super().__init__()
        self.width = width
        self.added = nn.Linear(width, embedding_width)
        zero_init(self.added)
        self.context: nn.Linear | None = None
        if text_width is not None:
            self.context = nn.Linear(width, CONTEXT_VECTORS * text_width)

    def forward(self, embedding: Tensor | None, batch_size: int) -> tuple[Tensor | None, Tensor]:
        """The vectors [B, 4, W], if any, and the projection [B, E] of embeddings [B, D].

        None stands for rows of zeros. Raises ValueError for another width.
        """
        if embedding is None:
            embedding = self.added.weight.new_zeros(batch_size, self.width)
        if embedding.shape[1:] != (self.width,):
            raise ValueError(
                f"image embeddings are {list(embedding.shape)}; this network takes "
                f"[B, {self.width}]"
            )
        scaled = embedding.to(self.added.weight.dtype) * self.width**0.5  # a mean square of 1
        context = self.context
        vectors = None if context is None else context(scaled).unflatten(1, (CONTEXT_VECTORS, -1))
        return vectors, self.added(scaled)


def vector_inputs(
    text: TextInput | None,
    labels: nn.Embedding | None,
    embeddings: EmbeddingInput | None,
    conditioning: Conditioning,
    t: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the vectors to attend to [B, L, W], and what is added to the embedding of t [B, E].

    The vectors are those of the texts, then those of the image embeddings. Each is None where the
    network has no such input. Raises ValueError for inputs that the network does not take.
    """
    states, added = None, label_embedding(labels, conditioning.labels, t)
    if text is not None:
        states, pooled = text(conditioning, len(t))
        if pooled is not None:
            added = pooled if added is None else pooled + added
    elif conditioning.tokens is not None or conditioning.text_states is not None:
        raise ValueError(
            "a text is given, but the network takes none; build it with text, or leave it out"
        )
    if embeddings is not None:
        vectors, projected = embeddings(conditioning.embedding, len(t))
        added = projected if added is None else projected + added
        if states is not None:
            states = torch.cat([states, vectors.to(states)], dim=1)
    elif conditioning.embedding is not None:
        raise ValueError(
            "an image embedding is given, but the network takes none; build it with "
            "embedding_width, or leave it out"
        )
    return states, added


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

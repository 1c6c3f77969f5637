"""Encoders and batches of a few pixels and tokens, for tests of contrastive training."""

import torch
from torch import Tensor

from ddpm_ray.data.loader import Batch
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.text_encoder import TextEncoderSpec

COUNT, SIDE = 8, 4
END, LENGTH, VOCABULARY = 1, 4, 12
TEXTS = [0, 1, 2, 1, 3, 4, 0, 1]  # number of the caption of each image: three pairs are equal


def tiny_encoders(*, learns_bias: bool = True) -> ContrastiveEncoders:
    """The same weights at each call, of which none is 0."""
    torch.manual_seed(3)
    text = TextEncoderSpec(VOCABULARY, END, (0, END, END, END), width=8, depth=1, heads=2)
    made = ContrastiveEncoders(ContrastiveSpec(3, 4, (1, 2), 1, 2, 6, text, learns_bias))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens_of(texts: list[int]) -> Tensor:
    return torch.tensor([[0, 2 + text, END, END] for text in texts])


def captioned_batch(texts: list[int] = TEXTS) -> Batch:
    generator = torch.Generator().manual_seed(5)
    shape = len(texts), SIDE, SIDE, 3
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Batch(images, torch.zeros(len(texts), dtype=torch.int64), tokens=tokens_of(texts))

"""A small classifier of 8x8 digits: which digit an image shows, and with what confidence.

Its weights lie next to this file; tests/golden/make_digits_classifier.py made them. It was shown
noise, blends and scrambled scans too, and taught to be sure of none, so that a confident answer
says that the image looks like a digit.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.data.codec import channels_first

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SIDE = 8  # pixels


class DigitsClassifier(nn.Module):
    """Grey images uint8 [N, 8, 8, 1] -> logits float32 [N, 10] of the digits 0 to 9."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv_3 = nn.Conv2d(32, 64, 3, padding=1)
        self.dense_1 = nn.Linear(64 * 4, 64)
        self.dense_2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [N, 10], as in `logits`."""
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 [N, 10]; softmax over the last dimension gives the confidence."""
        result: Tensor = self.dense_2(self.features(images))
        return result

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the last layer: float32 [N, 64], none negative."""
        if images.dtype != torch.uint8 or images.shape[1:] != (SIDE, SIDE, 1):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; "
                f"the digits classifier reads uint8 [N, {SIDE}, {SIDE}, 1]"
            )
        h = channels_first(images).float() / 255
        h = F.relu(self.conv_2(F.relu(self.conv_1(h))))
        h = F.relu(self.conv_3(F.max_pool2d(h, 2)))
        return F.relu(self.dense_1(F.max_pool2d(h, 2).flatten(1)))


def load_digits_classifier() -> DigitsClassifier:
    """The trained classifier in eval mode on the CPU, its weights frozen."""
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval().requires_grad_(False)

"""Networks through whose eyes two sets of images are compared, each with what identifies it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.models import digits_classifier

Extract: TypeAlias = Callable[[Tensor], Mapping[int, Tensor]]
"""uint8 images [N, H, W, C] -> features float32 [N, D] under each width D, in one pass."""


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A fixed network whose features stand for images when two sets of them are compared."""

    name: Literal["inception", "digits"]
    widths: tuple[int, ...]
    extract: Extract
    identity: Mapping[str, Any]  # what features depend on: weights_sha256, resize; plain JSON
    classify: Callable[[Tensor], Tensor] | None = None  # images [N, H, W, C] -> logits [N, classes]

    def __call__(self, images: Tensor) -> Mapping[int, Tensor]:
        """Features of uint8 images; raises ValueError where one is not finite."""
        with torch.inference_mode():
            features = self.extract(images)
        for width, values in features.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{self.name} features of width {width} are not finite; are the network's "
                    f"weights whole? (sha256 {self.identity.get('weights_sha256')})"
                )
        return features


def digits_net(device: torch.device | str) -> FeatureNet:
    """The bundled judge of 8x8 digits, which also says which of them it recognises."""
    classifier = digits_classifier.load_digits_classifier().to(device)
    return FeatureNet(
        name="digits",
        widths=(classifier.dense_1.out_features,),
        extract=lambda images: {classifier.dense_1.out_features: classifier.features(images)},
        identity={
            "weights_sha256": hashlib.sha256(digits_classifier.WEIGHTS.read_bytes()).hexdigest(),
            "resize": "none",
        },
        classify=classifier.logits,
    )

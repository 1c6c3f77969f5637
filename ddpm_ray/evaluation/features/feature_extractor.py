"""Networks through whose eyes two sets of images are compared, each with what identifies it."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.config.evaluation import InceptionResize
from ddpm_ray.evaluation.features import digits_classifier
from ddpm_ray.evaluation.features.inception_weights import load_inception

Extract: TypeAlias = Callable[[Tensor], Mapping[int, Tensor]]
"""uint8 images [N, H, W, C] -> features float32 [N, D] under each width D, in one pass."""


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A fixed network whose features stand for images when two sets of them are compared."""

    name: Literal["inception", "digits"]
    widths: tuple[int, ...]
    extract: Extract
    identity: Mapping[str, Any]  # what features depend on: weights_sha256, resize; plain JSON
    classify: Callable[[Mapping[int, Tensor]], Tensor] | None = None  # features -> logits [N, K]

    @property
    def facts(self) -> dict[str, Any]:
        """Name, widths and identity: features of nets with equal facts are comparable."""
        return {"network": self.name, "widths": sorted(self.widths), **self.identity}

    def __call__(self, images: Tensor) -> Mapping[int, Tensor]:
        """Features of uint8 images; raises ValueError where one is not finite."""
        with torch.inference_mode(), in_float32(images.device.type):
            features = self.extract(images)
        for width, values in features.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{self.name} features of width {width} are not finite; are the network's "
                    f"weights whole? (sha256 {self.identity.get('weights_sha256')})"
                )
        return features

    def probabilities(self, features: Mapping[int, Tensor]) -> Tensor | None:
        """Class probabilities [N, K] from features; None where the network does not classify."""
        if self.classify is None:
            return None
        with torch.inference_mode(), in_float32(next(iter(features.values())).device.type):
            return self.classify(features).softmax(1)


_flags = threading.RLock()


def float32_backends() -> list[Any]:
    """The precision setting, "ieee" or "tf32", of float32 convolutions and products on CUDA."""
    cudnn: Any = torch.backends.cudnn  # its stubs lack these
    return [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]


@contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Let no TF32 and no autocast change what a feature network says of an image.

    cuDNN convolves in TF32, with 10 bits of mantissa, by default; scores are compared in more. The
    flags are the process's, so that they are put back: training keeps those that it has. One thread
    at a time changes them, or the second would put back what the first had set.
    """
    backends = float32_backends()
    with _flags:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            with torch.autocast(device_type, enabled=False):
                yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def inception_net(
    path: Path, widths: Iterable[int], resize: InceptionResize, device: torch.device | str
) -> FeatureNet:
    """The FID network with the weights of the local file `path`; one pass gives all `widths`.

    Raises InceptionWeightsError where the file lacks what they need.
    """
    network = load_inception(path, widths, resize).to(device)
    return FeatureNet(
        name="inception",
        widths=tuple(sorted(network.widths)),
        extract=network.features,
        identity={"weights_sha256": _sha256(path), "resize": resize},
        classify=None if network.class_weight is None else network.class_logits,
    )


def digits_net(device: torch.device | str) -> FeatureNet:
    """The bundled classifier of 8x8 digits, as a feature network with class probabilities."""
    classifier = digits_classifier.load_digits_classifier().to(device)
    width = classifier.dense_1.out_features
    return FeatureNet(
        name="digits",
        widths=(width,),
        extract=lambda images: {width: classifier.features(images)},
        identity={"weights_sha256": _sha256(digits_classifier.WEIGHTS), "resize": "none"},
        classify=lambda features: classifier.dense_2(features[width]),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

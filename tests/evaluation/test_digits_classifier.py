"""The judge of generated digits: right on scans it never saw, unsure of what is no digit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_ray.evaluation.features.digits_classifier import WEIGHTS, load_digits_classifier

RECORD = Path(__file__).parent.parent / "golden" / "digits_classifier.json"


def held_out() -> tuple[Tensor, Tensor]:
    """Every fifth scan, as packed (0..16 spread over 0..255); the weights never saw these."""
    digits = load_digits()
    images = torch.tensor(digits.images[::5]).mul(255 / 16).round().to(torch.uint8)
    return images[..., None], torch.tensor(digits.target[::5])


def judged(images: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and answer for each image."""
    confidence, answer = load_digits_classifier()(images).softmax(1).max(1)
    return confidence, answer


def test_weights_are_the_ones_that_the_record_describes() -> None:
    record = json.loads(RECORD.read_text())
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == record["sha256"]
    images, labels = held_out()
    confidence, answer = judged(images)
    right = answer == labels
    share = (right & (confidence >= 0.9)).float().mean().item()
    assert right.float().mean().item() == pytest.approx(record["held_out"]["accuracy"], abs=1e-4)
    assert share == pytest.approx(record["held_out"]["right_and_confident"], abs=0.006)


def test_unseen_scans_are_recognised_and_almost_always_with_confidence() -> None:
    images, labels = held_out()
    confidence, answer = judged(images)
    right = answer == labels
    assert right.float().mean() >= 0.98
    assert (right & (confidence >= 0.9)).float().mean() >= 0.95
    assert (~right & (confidence >= 0.9)).float().mean() <= 0.003
    assert set(answer[confidence >= 0.9].tolist()) == set(range(10))


def test_a_scan_moved_by_a_pixel_is_still_recognised() -> None:
    images, labels = held_out()
    moved = torch.zeros_like(images)
    moved[:, 1:] = images[:, :-1]
    assert (judged(moved)[1] == labels).float().mean() >= 0.95


def garbage() -> dict[str, Tensor]:
    """No digits, and none of the kinds that the training made: drawn by other means."""
    generator = torch.Generator().manual_seed(9)
    images, labels = held_out()
    bright = (torch.rand(500, 8, 8, 1, generator=generator) < 0.35).to(torch.uint8) * 255
    grey = (128 + 50 * torch.randn(500, 8, 8, 1, generator=generator)).clamp(0, 255)
    level = torch.arange(256).view(-1, 1, 1, 1).expand(-1, 8, 8, 1)
    zeros, sevens = images[labels == 0][:25], images[labels == 7][:25]
    scrambled = images.flatten(1)[:, torch.randperm(64, generator=generator)]
    return {
        "black and white noise": bright,
        "grey noise": grey.to(torch.uint8),
        "flat": level.to(torch.uint8),
        "negatives": 255 - images,
        "two digits at once": torch.maximum(zeros, sevens),
        "scrambled": scrambled.view_as(images),
    }


@pytest.mark.parametrize("kind", garbage())
def test_garbage_is_not_accepted(kind: str) -> None:
    confidence, _ = judged(garbage()[kind])
    assert (confidence >= 0.9).float().mean() <= 0.05


def test_features_are_what_the_logits_are_made_of() -> None:
    classifier, (images, _) = load_digits_classifier(), held_out()
    features = classifier.features(images)
    assert features.shape == (len(images), 64)
    assert features.dtype == torch.float32
    assert features.min() == 0
    assert torch.equal(classifier.dense_2(features), classifier(images))


def test_file_is_small_and_holds_nothing_but_tensors() -> None:
    assert WEIGHTS.stat().st_size < 300_000
    with safe_open(WEIGHTS, framework="pt") as file:
        assert file.metadata() is None
        assert set(file.keys()) == set(load_digits_classifier().state_dict())


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 8, 8, 1),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 28, 28, 1, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images are torch.* reads uint8 \[N, 8, 8, 1\]"):
        load_digits_classifier()(images)

"""The score of samples against their prompts."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.evaluation.alignment import Alignment
from tests.fixtures.threaded_workers import OnWorkers

ANGLES = (0.0, 0.5, 1.1, 2.0)
PROMPTS = ["0.3", "1.0"]
DECODER = ("text.encoder=transformer", "embedding.encoder=runs/e")


class Angles:
    """Encoders of the plane: the grey of an image and the number in a text are angles."""

    sha256 = "a" * 64

    def image_embeddings(self, images: Tensor) -> Tensor:
        angles = images[:, 0, 0, 0].double() / 100
        return torch.stack([angles.cos(), angles.sin()], 1)

    def text_embeddings(self, prompts: list[str]) -> Tensor:
        angles = torch.tensor([float(one) for one in prompts], dtype=torch.float64)
        return torch.stack([angles.cos(), angles.sin()], 1)


def images_of(share: range) -> Iterator[tuple[Tensor, Tensor]]:
    for i in share:
        grey = np.full((1, 2, 2, 1), round(100 * ANGLES[i]), np.uint8)
        yield torch.tensor([i]), torch.from_numpy(grey)


def scored(workers: Workers) -> dict[str, float]:
    of = Alignment(Angles(), PROMPTS)  # type: ignore[arg-type]
    for _ in of.watched(images_of(workers.share(len(ANGLES)))):
        pass
    return of.metrics(workers)


def test_it_is_the_mean_cosine_with_its_interval_for_any_number_of_workers(
    on_workers: OnWorkers,
) -> None:
    cosines = [math.cos(angle - float(PROMPTS[i % 2])) for i, angle in enumerate(ANGLES)]
    found = scored(Workers())
    assert found["eval/alignment"] == pytest.approx(np.mean(cosines), abs=1e-12)
    half = 3.182446305 * np.std(cosines, ddof=1) / 2  # Student's for 3 degrees of freedom
    assert found["eval/alignment_low"] == pytest.approx(np.mean(cosines) - half, abs=1e-9)
    assert found["eval/alignment_high"] == min(1.0, np.mean(cosines) + half)
    for count in (2, 3):
        assert on_workers(count, scored) == [found] * count


@pytest.mark.parametrize(
    "keys, message",
    [
        (("evaluation.alignment_encoder=runs/e",), "this model draws no images of texts: leave it"),
        (
            ("task=prior", "text.encoder=transformer", "evaluation.alignment_encoder=runs/e"),
            "this model draws no images of texts",
        ),
        (
            (*DECODER, "evaluation.alignment_encoder=runs/e"),
            "texts, and samples of embeddings have none: set sampling.prompts",
        ),
    ],
)
def test_models_without_texts_have_none(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, None, ["name=x", "data.url=none", *keys])


def test_a_decoder_with_prompts_has_it() -> None:
    keys = ("evaluation.alignment_encoder=runs/e", "sampling.prompts=[a cat]")
    found = load_config(RunConfig, None, ["name=x", "data.url=none", *DECODER, *keys])
    assert found.evaluation.alignment_encoder == "runs/e"

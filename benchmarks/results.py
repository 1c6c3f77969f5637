"""Tables and pictures of one trained model with labels: what docs/results.md shows.

    python benchmarks/results.py RUN CLASSIFIER DATA INCEPTION FOLDER [images]

RUN is a run's folder, CLASSIFIER that of a run of task=classifier on the same data, DATA the
shards of its held-out half, INCEPTION the file of evaluation.weights (folded .npz: 192 features are
enough), FOLDER where tables.md and the pictures go. One process, no Ray; `images` samples for each
score, 500 by default.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from ddpm_ray.assembly import checkpoint_loading, classifier_loading
from ddpm_ray.collectives import Workers
from ddpm_ray.config.sampling import Sampler, SamplingSettings
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.loader import read_images
from ddpm_ray.diffusion.timestep_spacing import log_snr_steps, uniform_steps
from ddpm_ray.evaluation.features.feature_extractor import inception_net
from ddpm_ray.evaluation.reference_statistics import Reference, reference
from ddpm_ray.evaluation.sample_quality import SampleSet, evaluate_samples
from ddpm_ray.models.classifier import NoisyClassifier
from ddpm_ray.sampling.image_grid import captioned, grid
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images, SamplingPlan, first_step, sampling_plan

STEPS = 5, 10, 20, 50
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
AVERAGED: tuple[Sampler, ...] = ("ddim", "ancestral")
SCALES = 0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0
BATCH, NAME = 100, "eval/fid192"


class Scorer:
    """Scores plans of one model, and says which images a classifier takes for their label."""

    def __init__(
        self, data: str, inception: Path, classifier: NoisyClassifier, images: int
    ) -> None:
        self.net = inception_net(inception, [192], "original", "cpu")
        self.truth: Reference = reference(open_dataset(data), self.net, Workers())
        self.classifier, self.images = classifier, images

    def score(self, model: TrainedModel, plan: SamplingPlan) -> str:
        """The distance with its 95 % interval."""
        found = evaluate_samples(
            SampleSet(
                model.denoiser,
                plan,
                image_shape=model.image_shape,
                num_images=self.images,
                batch_size=BATCH,
                weights={},
            ),
            self.net,
            self.truth,
            Workers(),
        ).metrics
        return f"{found[NAME]:.3f} ({found[NAME + '_low']:.3f}-{found[NAME + '_high']:.3f})"

    def accuracy(self, images: Images, labels: torch.Tensor) -> float:
        """The share of images that the classifier takes for their label, at t = 1."""
        x = PIXELS.encode(torch.from_numpy(images))
        with torch.inference_mode():
            logits = self.classifier(x, torch.ones(len(x), dtype=torch.int64))
        return float((logits.argmax(1) == labels).float().mean())


def table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; print each row as it is computed."""
    for cells in (head, ["---"] * len(head)):
        yield "| " + " | ".join(cells) + " |"
    for cells in rows:
        print(*cells, sep="  ", file=sys.stderr, flush=True)
        yield "| " + " | ".join(cells) + " |"


def by_sampler(model: TrainedModel, scorer: Scorer) -> Iterator[list[str]]:
    """Each sampler at each number of steps, evenly spaced in t or, as solvers want, in log-SNR."""
    schedule = model.denoiser.schedule
    for sampler in SAMPLERS:
        even_in_t = sampler in ("ddim", "ancestral")
        first = first_step(schedule, sampler)
        plans = [
            SamplingPlan(
                uniform_steps(first, n) if even_in_t else log_snr_steps(schedule, n, first),
                SamplingSettings(sampler=sampler),
            )
            for n in STEPS
        ]
        yield [sampler, *(scorer.score(model, plan) for plan in plans)]


def by_scale(model: TrainedModel, scorer: Scorer) -> Iterator[list[str]]:
    """Guidance: distance, and how many samples are taken for their label."""
    labels = torch.arange(scorer.images) % model.denoiser.takes.num_classes
    for scale in SCALES:
        guided = model.with_settings(
            steps=20, sampler="unipc", guidance_scale=scale, batch_size=BATCH
        )
        images = guided.sample(scorer.images)
        right = 100 * scorer.accuracy(images, labels)
        yield [f"{scale:g}", scorer.score(model, _plan(guided)), f"{right:.1f} %"]


def by_average(run: str, scorer: Scorer) -> Iterator[list[str]]:
    """Samples of the averaged weights beside those of the last step's."""
    for name, group in (("EMA", "ema"), ("last step's", "model")):
        model = loaded(run, group)
        plans = [_plan(model.with_settings(steps=50, sampler=sampler)) for sampler in AVERAGED]
        yield [name, *(scorer.score(model, plan) for plan in plans)]


def _plan(model: TrainedModel) -> SamplingPlan:
    return sampling_plan(model.settings, model.denoiser.schedule)


def sheet(rows: dict[str, list[Images]], above: list[str]) -> Image.Image:
    """A picture with a row of equal groups of images for each name."""
    images = np.concatenate([group for row in rows.values() for group in row])
    wide = sum(len(group) for group in next(iter(rows.values())))
    return captioned(grid(images, wide), above=above, row_captions=[*rows])


def pictures(model: TrainedModel, data: str, folder: Path) -> None:
    """Samplers by steps, guidance, inpainting, outpainting, interpolation."""
    draw: Callable[..., Images] = model.sample
    digits = list(range(model.denoiser.takes.num_classes))
    sheet(
        {
            name: [draw(4, steps=n, sampler=name, labels=digits[2:]) for n in STEPS]
            for name in SAMPLERS
        },
        [f"{n} steps" for n in STEPS],
    ).save(folder / "samplers.png")
    sheet(
        {
            f"{scale:g}": [draw(20, steps=20, sampler="unipc", guidance_scale=scale, seed=3)]
            for scale in SCALES
        },
        ["20 labels in turn, by guidance scale"],
    ).save(folder / "guidance.png")
    shard = next(iter(read_images(open_dataset(data), [0])))
    spread = torch.arange(10) * len(shard.images) // 10  # packed by class
    known, labels = shard.images[spread].numpy(), shard.labels[spread].tolist()
    height = known.shape[1]
    mask = np.ones(known.shape[1:3], bool)
    mask[height // 2 :] = False
    hidden = np.where(mask[..., None], known, 128).astype(np.uint8)
    mend = partial(model.inpaint, known, mask, steps=50, labels=labels)
    mended = [mend(resamples=5, seed=seed) for seed in range(3)]
    cheap = mend(method="replacement")
    sheet(
        {
            "image": [known],
            "seen": [hidden],
            "1": [mended[0]],
            "2": [mended[1]],
            "3": [mended[2]],
            "replacement": [cheap],
        },
        ["ten held-out images, what is seen of them, three ways to paint the rest, the cheap form"],
    ).save(folder / "inpainting.png")
    wide = model.outpaint(known[::2], left=height, right=height, steps=50, resamples=5)
    grid(wide, 1).save(folder / "outpainting.png")
    pairs = [model.interpolate(2 * i, 2 * i + 1, 10, label=i) for i in range(0, 10, 2)]
    grid(np.concatenate(pairs), 10).save(folder / "interpolation.png")


def loaded(run: str, group: str = "ema") -> TrainedModel:
    """The run's model, with the settings that all runs share by default."""
    return replace(checkpoint_loading.trained_model(run, ema=group), settings=SamplingSettings())


def main() -> None:
    run, classifier, data, inception, out = sys.argv[1:6]
    images, folder = int(sys.argv[6]) if len(sys.argv) > 6 else 500, Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = loaded(run)
    scorer = Scorer(
        data, Path(inception), classifier_loading.trained_classifier(classifier), images
    )
    pictures(model, data, folder)
    held_out = next(iter(read_images(open_dataset(data), [0])))
    some = torch.arange(2000) * len(held_out.images) // 2000  # packed by class
    known = scorer.accuracy(held_out.images[some].numpy(), held_out.labels[some])
    lines = [
        f"The classifier takes {100 * known:.1f} % of held-out images for their label.",
        "",
        *table(["sampler", *(f"{n} steps" for n in STEPS)], by_sampler(model, scorer)),
        "",
        *table(["guidance scale", NAME, "taken for their label"], by_scale(model, scorer)),
        "",
        *table(["weights", *(f"{name}, 50 steps" for name in AVERAGED)], by_average(run, scorer)),
    ]
    (folder / "tables.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

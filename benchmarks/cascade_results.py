"""Accuracy and pictures of a cascade of sprites: prior and decoder against true embeddings.

    python -m benchmarks.cascade_results CASCADE DATA FOLDER [prompts] [guidance scales] [images]
    python -m benchmarks.cascade_results CASCADE priors PROMPTS SCALES PRIOR...

CASCADE is a folder of `ddpm-ray cascade` whose models were trained on the seen characters, DATA the
shards of captioned held-out characters of the cascade's size. Each prompt is the caption of a
character that was held out; benchmarks/text_results.py says how the parts of an image are found.
First a table: real images, images that the decoder draws from their true embeddings (with their
captions, and without), and those of the cascade. Then, for each guidance scale, the distance to
DATA and the alignment of `images` samples with their captions, in the space of the decoder's own
encoder. FOLDER gets the pictures. DDPM_RAY_ASSETS names the assets. One process, no Ray.
"""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot

import ddpm_ray
from benchmarks.results import sheet
from benchmarks.text_results import line, poses, sprites
from ddpm_ray.assembly.image_encoders import NamedImageEncoder
from ddpm_ray.assembly.prior_loading import trained_prior
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.runs.evaluation.evaluate_cascade import cascade_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.sampling import Images

PROMPTS, SCALES, IMAGES, SHOWN, SEEDS = 240, (1.0, 2.0, 3.0, 5.0), 300, 8, 4
INCEPTION = "inception_2015_12_05_to_mixed6e_folded_f32.npz"


def smaller(images: Images, side: int) -> Images:
    """Square images reduced to `side` by averaging."""
    by = images.shape[1] // side
    parts = images.reshape(len(images), side, by, side, by, -1)
    return np.asarray(parts.mean((2, 4)).round().astype(np.uint8))


def larger(images: Images, side: int) -> Images:
    """Images with each pixel as a square, for a picture with larger ones."""
    by = side // images.shape[1]
    return images.repeat(by, 1).repeat(by, 2)


def drawn(made: ModuleType, count: int) -> tuple[list[tuple[Any, str, str]], list[str], Images]:
    """Held-out characters in poses, their captions and their images of full size."""
    of = poses(made, count)
    full = np.stack([made.clip(*one)[n % made.FRAMES] for n, one in enumerate(of)])
    return of, [made.caption(*one) for one in of], full


def table(cascade: Cascade, count: int) -> None:
    """Print the shares of right parts."""
    made = sprites()
    of, prompts, full = drawn(made, count)
    small = smaller(full, cascade.image_size[0])
    print(f"{count} held-out prompts, {cascade.settings.steps} steps; % right")
    print(f"{'':12s} {' '.join(f'{name[:6]:>6s}' for name in made.PARTS)}    all")
    print(line(made, "real", smaller(full, cascade.drawn_shape[0]), of))
    print(line(made, "true+text", cascade.variations(small, prompts=prompts), of), flush=True)
    print(line(made, "true", cascade.variations(small), of), flush=True)
    print(line(made, "cascade", cascade.sample(count, prompts=prompts), of), flush=True)


def pictures(cascade: Cascade, folder: Path) -> None:
    """Write pictures of prompts, stage by stage, of variations and of interpolations."""
    made = sprites()
    _, prompts, full = drawn(made, SHOWN)
    small, side = smaller(full, cascade.image_size[0]), cascade.drawn_shape[0]
    rows = {"real": [smaller(full, side)]}
    if cascade.upsamplers:
        decoded = replace(cascade, upsamplers=()).sample(SHOWN, prompts=prompts)
        rows["decoder"] = [larger(decoded, side)]
    rows["cascade"] = [cascade.sample(SHOWN, prompts=prompts)]
    sheet(rows, ["held-out characters, from their captions"]).save(folder / "cascade.png")
    for prompt in prompts:
        print(prompt)
    each = [cascade.variations(small, seed=seed) for seed in range(SEEDS)]
    varied = {"original": [larger(small, side)]} | {f"seed {n}": [each[n]] for n in range(SEEDS)}
    sheet(varied, ["variations of an image, by its embedding"]).save(folder / "variations.png")
    between = {
        f"{n + 1} to {n + 2}": [cascade.interpolate(prompts[n], prompts[n + 1], SHOWN)]
        for n in range(0, SHOWN, 2)
    }
    sheet(between, ["between the captions of the characters"]).save(
        folder / "prompt-interpolation.png"
    )


def guidance(cascade: Cascade, data: str, scales: list[float], count: int, folder: Path) -> None:
    """Print and plot the distance against the alignment, by guidance scale."""
    weights = str(Path(os.environ["DDPM_RAY_ASSETS"], INCEPTION))
    encoder = cascade.denoiser.takes.image_encoder
    assert isinstance(encoder, NamedImageEncoder)
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    wanted = EvaluationConfig(
        num_images=count, widths=(192,), weights=weights, weights_sha256=digest
    )
    found: list[dict[str, float]] = []
    for scale in scales:
        chosen = cascade.with_settings(guidance_scale=scale)
        config = EvaluateConfig(data, sampling=chosen.settings, evaluation=wanted)
        progress = ImageProgress(count, Workers(), lambda _: None)
        scores: dict[str, Any] = cascade_scores(
            chosen, config, encoder.encoders, Workers(), progress
        )
        found.append(scores["metrics"])
        of = found[-1]
        print(
            f"guidance_scale={scale:g}  eval/fid192 {of['eval/fid192']:.3f} "
            f"({of['eval/fid192_low']:.3f}..{of['eval/fid192_high']:.3f})  eval/alignment "
            f"{of['eval/alignment']:.4f} ({of['eval/alignment_low']:.4f}.."
            f"{of['eval/alignment_high']:.4f})",
            flush=True,
        )
    mpl.use("Agg")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    at = [one["eval/alignment"] for one in found]
    distances = [one["eval/fid192"] for one in found]
    spread = [
        [d - one["eval/fid192_low"] for d, one in zip(distances, found, strict=True)],
        [one["eval/fid192_high"] - d for d, one in zip(distances, found, strict=True)],
    ]
    axes.errorbar(at, distances, yerr=spread, marker="o", capsize=3)
    for scale, x, y in zip(scales, at, distances, strict=True):
        axes.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(6, 6))
    axes.set_xlabel("alignment: mean cosine of image and caption")
    axes.set_ylabel("eval/fid192, 95 % interval")
    axes.set_title("Prior and decoder by guidance scale")
    figure.savefig(folder / "cascade-guidance.png", dpi=120)


def priors(cascade: Cascade, count: int, scales: list[float], urls: list[str]) -> None:
    """Print the shares of right parts with each prior and guidance scale of the prior."""
    made = sprites()
    of, prompts, full = drawn(made, count)
    small = smaller(full, cascade.image_size[0])
    decoder = replace(cascade, upsamplers=())
    print(f"{count} held-out prompts, {cascade.settings.steps} steps; % right")
    print(f"{'':12s} {' '.join(f'{name[:6]:>6s}' for name in made.PARTS)}    all")
    print(line(made, "true+text", decoder.variations(small, prompts=prompts), of), flush=True)
    for url in urls:
        prior = trained_prior(url)
        for scale in scales:
            guided = replace(prior, settings=replace(prior.settings, guidance_scale=scale))
            images = replace(decoder, prior=guided).sample(count, prompts=prompts)
            print(line(made, f"{Path(url).name} {scale:g}", images, of), flush=True)


def main(given: list[str]) -> None:
    """Print tables and write pictures."""
    loaded = ddpm_ray.load_cascade(given[0], "cpu")
    if given[1] == "priors":
        priors(loaded, int(given[2]), [float(scale) for scale in given[3].split(",")], given[4:])
        return
    out = Path(given[2])
    table(loaded, int(given[3]) if len(given) > 3 else PROMPTS)
    pictures(loaded, out)
    swept = [float(scale) for scale in given[4].split(",")] if len(given) > 4 else list(SCALES)
    if swept:
        guidance(loaded, given[1], swept, int(given[5]) if len(given) > 5 else IMAGES, out)


if __name__ == "__main__":
    main(sys.argv[1:])

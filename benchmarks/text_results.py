"""Accuracy of a text-to-image model on sprites: are the named parts in the picture?

    python -m benchmarks.text_results RUN FOLDER [prompts] [guidance scales, comma-separated]

RUN was trained on the sprites of the seen characters. Each prompt is the caption of a character
that was held out, in one of the 12 poses; the generator of the assets (DDPM_RAY_ASSETS) gives the
parts of each image, in the frame of the pose that is nearest. A line for each guidance scale: the
share of images with the right skin, trousers, shirt and hair, with all four, and the same for the
decoded images of a latent model's autoencoder. FOLDER gets a grid of the first prompts, a row for
each scale. Last, the hair of real images is changed by `text_diff`: the share of images with the
new hair and all other parts as they were, and a picture. One process, no Ray.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import ddpm_ray
from benchmarks.results import sheet
from ddpm_ray.sampling.sampling import Images

PROMPTS, SCALES, SHOWN, CHANGED = 240, (1.0, 2.0, 3.0, 5.0), 8, 24
STEPS = 25


def sprites() -> ModuleType:
    """The generator of the images, of the assets."""
    path = Path(os.environ["DDPM_RAY_ASSETS"], "sprites", "sprites.py")
    spec = importlib.util.spec_from_file_location("sprites", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def poses(made: ModuleType, count: int) -> list[tuple[Any, str, str]]:
    """Held-out (character, action, direction), drawn by a fixed seed."""
    drawn: list[tuple[Any, str, str]] = made._draws(count, 1, "held-out")
    return drawn


def found_parts(made: ModuleType, images: Images, of: list[tuple[Any, str, str]]) -> Any:
    """Indices [N, 4] of the parts of each image: of the nearest character and frame of its pose."""
    side = images.shape[1]
    nearest = np.full(len(images), np.inf)
    parts = np.zeros((len(images), len(made.PARTS)), np.int64)
    pose = np.array([f"{action} {direction}" for _, action, direction in of])
    for action in made.ACTIONS:
        for direction in made.DIRECTIONS:
            rows = np.flatnonzero(pose == f"{action} {direction}")
            for frame in range(made.FRAMES) if len(rows) else ():
                every, table = made._table(action, direction, frame, side)
                x = images[rows].reshape(len(rows), -1).astype(np.float32)
                apart = (table**2).sum(1)[None] - 2 * x @ table.T  # less the image's own square
                named = np.array(every)[apart.argmin(1)]
                better = apart.min(1) < nearest[rows]
                nearest[rows[better]] = apart.min(1)[better]
                parts[rows[better]] = named[better]
    return parts


def with_other_hair(made: ModuleType, of: list[tuple[Any, str, str]]) -> list[tuple[Any, str, str]]:
    """The same characters in the same poses with the next hair of the list."""
    place = [*made.PARTS].index("hair")
    changed = []
    for who, action, direction in of:
        parts = list(who)
        parts[place] = (parts[place] + 1) % len(made.PARTS["hair"])
        changed.append((tuple(parts), action, direction))
    return changed


def line(made: ModuleType, name: str, images: Images, of: list[tuple[Any, str, str]]) -> str:
    """The share of images with each right part, and with all."""
    right = found_parts(made, images, of) == np.array([who for who, _, _ in of])
    each = " ".join(f"{100 * share:6.1f}" for share in right.mean(0))
    return f"{name:12s} {each} {100 * right.all(1).mean():6.1f}"


def main(url: str, folder: Path, count: int, scales: list[float]) -> None:
    """Print the table and write the grid."""
    made, model = sprites(), ddpm_ray.load(url)
    of = poses(made, count)
    prompts = [made.caption(*one) for one in of]
    real = np.stack([made.clip(*one)[n % made.FRAMES] for n, one in enumerate(of)])
    side = model.image_size[0]
    by = made.SIDE // side
    real = real.reshape(count, side, by, side, by, 3).mean((2, 4)).round().astype(np.uint8)
    print(f"{count} held-out prompts, {STEPS} steps; % right")
    print(f"{'scale':12s} {' '.join(f'{name[:6]:>6s}' for name in made.PARTS)}    all")
    print(line(made, "real", real, of))
    codec = model.denoiser.codec
    if codec.factor > 1:
        print(line(made, "decoded", codec.decode(codec.encode_images(torch.from_numpy(real))), of))
    rows = {"real": [real[:SHOWN]]}
    for scale in scales:
        images = model.sample(
            count, prompts=prompts, guidance_scale=scale, sampler="dpm_solver_pp", steps=STEPS
        )
        rows[f"scale {scale:g}"] = [images[:SHOWN]]
        print(line(made, f"{scale:g}", images, of), flush=True)
    sheet(rows, ["held-out characters, drawn from their captions"]).save(
        folder / "text-held-out.png"
    )
    for prompt in prompts[:SHOWN]:
        print(prompt)
    changed = with_other_hair(made, of[:CHANGED])
    wanted = [made.caption(*one) for one in changed]
    edited = np.concatenate(
        [
            model.text_diff(real[n : n + 1], prompts[n], wanted[n], steps=STEPS, guidance_scale=3.0)
            for n in range(CHANGED)
        ]
    )
    print(line(made, "text_diff", edited, changed))
    sheet(
        {"real": [real[:SHOWN]], "text_diff": [edited[:SHOWN]]},
        ["the caption of each real image, with another hair"],
    ).save(folder / "text-diff.png")
    for prompt in wanted[:SHOWN]:
        print(prompt)


if __name__ == "__main__":
    given = sys.argv[1:]
    wanted = [float(scale) for scale in given[3].split(",")] if len(given) > 3 else list(SCALES)
    main(given[0], Path(given[1]), int(given[2]) if len(given) > 2 else PROMPTS, wanted)

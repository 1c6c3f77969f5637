"""Pictures and curves of latent diffusion: what docs/results.md shows of it.

    python -m benchmarks.latent_results AUTOENCODER LATENTS PIXELS HELD_OUT FOLDER

AUTOENCODER is a run of task=autoencoder, LATENTS a run on the latents that it encoded, PIXELS a run
on the same images, HELD_OUT a packed set of images that none of them saw, FOLDER where the pictures
go. The curves come from the tracking server of the runs and go to stdout. One process, no Ray.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.tracking import MlflowClient

import ddpm_ray
from benchmarks.results import sheet, table
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.loader import read_images
from ddpm_ray.sampling.image_grid import grid
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri

SHOWN, WIDE = 10, 5  # images of a row, outpainted images
SCORE, CEILING, COST = "eval/fid192", "eval/fid192_ceiling", "train/core_seconds"


def some_images(data: str, count: int) -> Images:
    """`count` images of the first shard, evenly spaced: uint8 [count, H, W, C]."""
    images = next(iter(read_images(open_dataset(data), [0]))).images
    chosen: Images = images[torch.arange(count) * len(images) // count].numpy()
    return chosen


def pictures(autoencoder: str, latents: str, pixels: str, held_out: str, folder: Path) -> None:
    """Reconstructions, samples, inpainting and outpainting."""
    seen = some_images(held_out, SHOWN)
    codec = trained_autoencoder(autoencoder, "cpu")
    decoded = codec.decode_uint8(codec.encode_uint8(seen).mean)
    apart = np.abs(seen.astype(np.int16) - decoded).clip(0, 63).astype(np.uint8) * 4
    sheet(
        {"image": [seen], "decoded": [decoded], "4 x error": [apart]},
        ["unseen images, encoded and decoded"],
    ).save(folder / "latent-reconstructions.png")
    model = ddpm_ray.load(latents)
    rows = {"images": [seen], "latents": [model.sample(SHOWN)]}
    rows["pixels"] = [ddpm_ray.load(pixels).sample(SHOWN)]
    sheet(rows, ["images, and samples of two models"]).save(folder / "latent-samples.png")
    mask = np.ones(seen.shape[1:3], bool)
    mask[seen.shape[1] // 2 :] = False
    hidden = np.where(mask[..., None], seen, 128).astype(np.uint8)
    painted = {f"draw {seed}": [model.inpaint(seen, mask, seed=seed)] for seed in range(1, 4)}
    sheet(
        {"image": [seen], "known": [hidden], **painted},
        ["unseen images, their lower half drawn"],
    ).save(folder / "latent-inpainting.png")
    side = seen.shape[1] // 2
    wide = model.outpaint(seen[:WIDE], left=side, right=side)
    grid(wide, 1).save(folder / "latent-outpainting.png")


def curve(name: str) -> Iterator[list[str]]:
    """Core-seconds of training, distance and its ceiling at each scored step of the newest run."""
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"attributes.run_name = '{name}'",
        output_format="list",
    )
    client = MlflowClient()
    history = {
        key: {row.step: row.value for row in client.get_metric_history(runs[0].info.run_id, key)}
        for key in (COST, SCORE, f"{SCORE}_low", f"{SCORE}_high", CEILING)
    }
    for step, distance in sorted(history[SCORE].items()):
        low, high, ceiling = (
            history[key].get(step, float("nan"))
            for key in (f"{SCORE}_low", f"{SCORE}_high", CEILING)
        )
        cost = max(spent for at, spent in history[COST].items() if at <= step)
        yield [
            str(step),
            f"{cost:.0f}",
            f"{distance:.3f} ({low:.3f}-{high:.3f})",
            "none" if math.isnan(ceiling) else f"{ceiling:.3f}",
        ]


def main() -> None:
    autoencoder, latents, pixels, held_out, out = sys.argv[1:6]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(resolve_tracking_uri(Path.cwd(), ""))
    for run in (latents, pixels):
        head = ["step", COST, SCORE, CEILING]
        print(f"\n{run}\n", *table(head, curve(Path(run).name)), sep="\n")
    pictures(autoencoder, latents, pixels, held_out, folder)


if __name__ == "__main__":
    main()

"""The training loss with bfloat16 weights, beside that in float32.

    python -m benchmarks.bf16_loss [--steps 400] [--seeds 3]

The run of conf/train/digits.yaml (8x8 digits) without its driver, with 16 channels and batches of
16: many CPUs have no bfloat16 units, and take a second for such a step. For each seed, both
precisions train from the same weights, with the same images, timesteps and noise, so that all that
differs is rounding. The table gives the mean loss of the last quarter of the steps, and the
difference in each quarter. The last line is the mean difference over the seeds with its 95 %
interval (Student's), and the standard deviation of the loss between seeds, to compare it with.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddpm_ray.assembly import training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.packing.builtin_datasets import load_arrays
from ddpm_ray.evaluation.confidence_interval import interval_of_mean

CONFIG = Path(__file__).parents[1] / "conf/train/digits.yaml"
SMALL = "model.base_channels=16", "training.global_batch_size=16", "cluster.num_workers=1"
PRECISIONS = "fp32", "bf16_weights"
QUARTERS = 4


def stepping(precision: str, seed: int, images: Tensor) -> Callable[[int], float]:
    """A training step, which returns its mean loss; its number counts from 0."""
    keys = f"seed={seed}", f"training.precision={precision}"
    config = load_config(RunConfig, str(CONFIG), [*SMALL, *keys])
    workers, shape = Workers(), ImageShape(*images.shape[1:])
    state = training_run.training_state(config, shape, workers.device, {})
    objective = training_run.training_objective(config, state, workers.device)
    plan, count = training_run.plan(config, 1), config.training.global_batch_size

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(seed * 2**32 + number)
        chosen = images[torch.randint(len(images), (count,), generator=generator)]
        batch = Batch(chosen, torch.full((count,), -1))
        losses, *_ = objective.backward(state.network, batch, number, workers, count)
        state.clip_gradients(plan.max_grad_norm)
        state.step_optimizers(plan.learning_rate(number), torch.tensor(True))
        return losses.mean().item()

    return step


def quarters(losses: list[float]) -> list[float]:
    """The mean loss of each quarter of the steps."""
    size = len(losses) // QUARTERS
    return [statistics.fmean(losses[i * size : (i + 1) * size]) for i in range(QUARTERS)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    images = torch.from_numpy(load_arrays("digits", "train").images)
    last: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for seed in range(arguments.seeds):
        steps = {name: stepping(name, seed, images) for name in PRECISIONS}
        losses: dict[str, list[float]] = {name: [] for name in PRECISIONS}
        for number in range(arguments.steps):
            for name, step in steps.items():
                losses[name].append(step(number))
        means = {name: quarters(found) for name, found in losses.items()}
        for name in PRECISIONS:
            last[name].append(means[name][-1])
        exact, rounded = (means[name] for name in PRECISIONS)
        apart = " ".join(f"{b - a:+.5f}" for a, b in zip(exact, rounded, strict=True))
        print(f"seed {seed}: {exact[-1]:.5f} in fp32, {rounded[-1]:.5f}; by quarter {apart}")
    differences = [b - a for a, b in zip(*(last[name] for name in PRECISIONS), strict=True)]
    squares = sum(one * one for one in differences)
    mean, low, high = interval_of_mean(len(differences), sum(differences), squares)
    between = statistics.stdev(last["fp32"])
    print(f"difference {mean:+.5f} ({low:+.5f} to {high:+.5f}); between seeds {between:.5f}")
    print(json.dumps({**last, "difference": mean, "low": low, "high": high, "seeds": between}))


if __name__ == "__main__":
    main()

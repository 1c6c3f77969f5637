"""Scaling of bits per dimension and Frechet distances from one worker to two.

    python benchmarks/scaling.py [rounds]

Two processes of one thread each under gloo take turns: the first alone does all the work while the
other waits, then both share it. 1 is linear: half the time. The first row is what the machine
gives: network calls alone, that share nothing but its memory. Grey images of 16x16, a U-Net of
0.6 M parameters; the distance is that of Inception's first 192 features with random weights.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ddpm_ray.collectives import Workers
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.features.inception import Inception
from ddpm_ray.evaluation.frechet import Moments
from ddpm_ray.evaluation.reference_statistics import Reference
from ddpm_ray.evaluation.sample_quality import SampleSet, evaluate_samples
from ddpm_ray.evaluation.vlb_over_dataset import vlb_bits_per_dim
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
IMAGES, SIDE, STEPS, BATCH, CALLS = 128, 16, 8, 32, 64


def works() -> dict[str, Callable[[Workers], object]]:
    """Each takes all IMAGES, shared among the workers."""
    torch.manual_seed(0)
    network = UNet(
        UNetSpec(
            image_channels=1,
            base_channels=32,
            channel_mults=(1, 2),
            blocks_per_level=1,
            attention_factors=(2,),
            groups=8,
        )
    ).eval()
    schedule = NoiseSchedule(schedules.cosine(100))
    denoiser = Denoiser(network, Parameterization.of("epsilon", schedule))
    plan = SamplingPlan(uniform_steps(100, STEPS))
    inception = Inception([192])
    net = FeatureNet("inception", (192,), inception.features, {})
    moments = Moments.zeros(192)
    moments.update(torch.rand(400, 192))
    identity = {"data": "", "features": net.facts}
    truth = Reference(
        identity, ImageShape(SIDE, SIDE, 1), {192: moments}, {192: torch.empty(0, 192)}
    )
    images = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 1), dtype=torch.uint8)

    def bits(workers: Workers) -> object:
        mine = torch.arange(IMAGES)[workers.share(IMAGES)]
        batches = [(part, images[part], torch.full_like(part, -1)) for part in mine.split(BATCH)]
        return vlb_bits_per_dim(
            denoiser, batches, variance="fixed_small", workers=workers, terms=STEPS
        )

    def distance(workers: Workers) -> object:
        return evaluate_samples(
            SampleSet(
                denoiser,
                plan,
                image_shape=ImageShape(SIDE, SIDE, 1),
                num_images=IMAGES,
                batch_size=BATCH,
                weights={},
            ),
            net,
            truth,
            workers,
        )

    def calls(workers: Workers) -> object:
        x, t = torch.randn(BATCH, 1, SIDE, SIDE), torch.full((BATCH,), 50)
        with torch.inference_mode():
            return [network(x, t).sum() for _ in workers.share(CALLS)]

    return {"network calls": calls, "bits per dimension": bits, "Frechet distance": distance}


def work(rank: int, meeting: str) -> None:
    """One of the two; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name, act in works().items():
        ratios = []
        for _ in range(1 + ROUNDS):
            took_s = []
            for workers in (Workers(), Workers(rank, 2)):
                dist.barrier()
                began_s = time.perf_counter()
                if workers.count == 2 or rank == 0:
                    act(workers)
                took_s.append(time.perf_counter() - began_s)
            ratios.append(took_s[0] / (2 * took_s[1]))
        if rank == 0:
            low, *_, high = sorted(ratios[1:])
            middle = statistics.median(ratios[1:])
            print(f"{name:20} {middle:.3f} of linear ({low:.3f}-{high:.3f})", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        spawn(work, (f"file://{scratch}/meet",), nprocs=2)


if __name__ == "__main__":
    main()

"""Our U-Net against diffusers' UNet2DModel: forward and backward, work per CPU second.

    python benchmarks/unet.py [--rounds 5] [--threads 1]

Both networks have the same parameters (35.7 M and 2.2 M) and see the same batch in turn, so a
drift of the machine hits both alike. `work` is images per CPU second times FLOPs per image, and
`ratio` is ours over theirs, the median of the rounds with the least and the greatest. Without
diffusers, which is no dependency of ours, only our own rate is printed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

FORMS = {"35.7 M": (128, 32, 4), "2.2 M": (32, 8, 16)}  # base channels, norm groups, batch
Predict = Callable[[Tensor, Tensor], Tensor]


def ours(base_channels: int, groups: int) -> tuple[nn.Module, Predict]:
    network = UNet(UNetSpec(image_channels=3, base_channels=base_channels, groups=groups))
    return network, network


def theirs(base_channels: int, groups: int) -> tuple[nn.Module, Predict]:
    """The configuration of google/ddpm-cifar10-32; it counts t from 0."""
    module: Any = importlib.import_module("diffusers")
    network = module.UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(base_channels * mult for mult in (1, 2, 2, 2)),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=groups,
        norm_eps=1e-6,
    )
    return network, lambda x_t, t: network(x_t, t - 1).sample


def training_flops(predict: Predict) -> int:
    """Floating-point operations of one image, forward and backward."""
    # Attention as plain products: the counter does not know the CPU's fused kernel.
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_attention, FlopCounterMode(display=False) as counter:
        loss = predict(torch.randn(1, 3, 32, 32), torch.tensor([1])).square().mean()
        torch.autograd.backward(loss)
    return int(counter.get_total_flops())


def step(network: nn.Module, predict: Predict, batch: int, bf16: bool) -> Callable[[], float]:
    """A forward and backward pass; returns its images per CPU second."""
    x_t, t = torch.randn(batch, 3, 32, 32), torch.randint(1, 1001, (batch,))

    def run() -> float:
        network.zero_grad(set_to_none=True)
        start_s = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = predict(x_t, t).float().square().mean()
        torch.autograd.backward(loss)
        return batch / (time.process_time() - start_s)

    return run


def compare(form: str, bf16: bool, rounds: int) -> str:
    base_channels, groups, batch = FORMS[form]
    builders = {"ours": ours, "theirs": theirs}
    if importlib.util.find_spec("diffusers") is None:
        del builders["theirs"]
    steps, flops = {}, {}
    for name, build in builders.items():
        network, predict = build(base_channels, groups)
        flops[name] = training_flops(predict)
        steps[name] = step(network, predict, batch, bf16)
        steps[name]()
    work: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            work[name].append(run() * flops[name] / 1e9)
    medians = {name: statistics.median(values) for name, values in work.items()}
    line = f"{form:8} {'bf16' if bf16 else 'fp32'}  {medians['ours']:13.1f}"
    if "theirs" not in work:
        return line
    ratios = [a / b for a, b in zip(work["ours"], work["theirs"], strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"{line}  {medians['theirs']:18.1f}  {middle:5.2f}  {low:.2f}-{high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("form     type  ours, GFLOP/s  diffusers, GFLOP/s  ratio  range")
    for form in FORMS:
        for bf16 in (False, True):
            print(compare(form, bf16, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()

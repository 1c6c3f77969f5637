"""Our U-Net against diffusers' UNet2DModel, and one precision against another, per CPU second.

    python -m benchmarks.unet [--rounds 5] [--threads 1] [--forms "2.2 M"]
                             [--channels-last] [--compile]
    python -m benchmarks.unet --precisions

Both networks have the same parameters (35.7 M and 2.2 M) and see the same batch in turn, so a
drift of the machine hits both alike. A row is a training step (forward, backward, fused Adam) or a
network call of a sampler. `ratio` is ours over theirs, the median of the rounds with the least and
the greatest. Without diffusers, which is no dependency of ours, only our own rate is printed.

bf16 is autocast for diffusers and bf16_weights for ours. `--precisions` compares bf16_weights with
float32 and autocast in our own network instead, and counts casts and activations of a forward pass.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.forward_cost import forward_cost
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.training.bf16_weights import Bf16Weights

FORMS = {"35.7 M": (128, 32, 4), "2.2 M": (32, 8, 16)}  # base channels, norm groups, batch
COMPARED = (  # what is done, our precision, that of diffusers
    ("training", "fp32", "fp32"),
    ("training", "bf16_weights", "bf16"),
    ("sampling", "fp32", "fp32"),
    ("sampling", "bf16_weights", "fp32"),
)
Predict = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[], float]


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


def run_of(
    what: str,
    made: tuple[nn.Module, Predict],
    batch: int,
    precision: str,
    layout: Any = torch.contiguous_format,
    compiled: bool = False,
) -> Run:
    """A training step or a sampler's network call; it returns its images per CPU second."""
    network, predict = made
    network.to(memory_format=layout)  # type: ignore[call-overload]  # not in the stubs
    weights = Bf16Weights(network) if precision == "bf16_weights" else None
    predict = predict if weights is None else weights.network
    predict = torch.compile(predict) if compiled else predict
    autocast = precision == "bf16"
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    x_t = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
    t = torch.randint(1, 1001, (batch,))

    def sampling() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predict(x_t, t)

    def training() -> None:
        if weights is not None:
            weights.refresh()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = predict(x_t, t).float().square().mean()
        torch.autograd.backward(loss)
        if weights is not None:
            weights.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()

    act = sampling if what == "sampling" else training

    def timed() -> float:
        start_s = time.process_time()
        act()
        return batch / (time.process_time() - start_s)

    return timed


def interleaved(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Rates of each in `rounds` rounds, after one that is not counted."""
    rates = [{name: run() for name, run in runs.items()} for _ in range(rounds + 1)]
    return {name: [one[name] for one in rates[1:]] for name in runs}


def line(title: str, rates: Mapping[str, list[float]]) -> str:
    """The median rate of each, and the ratio of the first to each other one."""
    first, *others = rates
    text = f"{title:45} {first} {statistics.median(rates[first]):7.2f}"
    for name in others:
        ratios = [a / b for a, b in zip(rates[first], rates[name], strict=True)]
        text += f"   {name} {statistics.median(rates[name]):7.2f}"
        text += f"  {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return text


def compare(form: str, rounds: int, layout: torch.memory_format, compiled: bool) -> None:
    """Print a line for each row of COMPARED."""
    base_channels, groups, batch = FORMS[form]
    peer = importlib.util.find_spec("diffusers") is not None
    for what, precision, its in COMPARED:
        runs = {
            "ours": run_of(what, ours(base_channels, groups), batch, precision, layout, compiled)
        }
        if peer:
            made = theirs(base_channels, groups)
            runs["diffusers"] = run_of(what, made, batch, its)
        title = f"{form} {what}, {precision} against {its}"
        print(line(title, interleaved(runs, rounds)), flush=True)


def precisions(form: str, rounds: int, layout: torch.memory_format) -> None:
    """Print a line for training and one for sampling of our network."""
    base_channels, groups, batch = FORMS[form]
    for what in ("training", "sampling"):
        runs = {
            name: run_of(what, ours(base_channels, groups), batch, name, layout)
            for name in ("bf16_weights", "fp32", "bf16")
        }
        print(line(f"{form} {what}", interleaved(runs, rounds)), flush=True)


def costs() -> None:
    """Print what a forward pass of the 35.7 M form costs on this CPU, at a quarter of its width."""
    found = {name: forward_cost(name, torch.device("cpu")) for name in ("bf16", "bf16_weights")}
    for name, (casts, count) in found.items():
        share = count / found["bf16"].bytes_per_image
        print(f"{name:12} {casts:3} casts, {count / 1e6:.2f} MB saved for an image ({share:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--precisions", action="store_true", help="our network alone")
    parser.add_argument("--channels-last", action="store_true", help="our network in NHWC")
    parser.add_argument("--compile", action="store_true", help="our network with torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    if arguments.precisions:
        costs()
    print("images per CPU second; ratio of the first to each, least and greatest")
    for form in arguments.forms:
        if arguments.precisions:
            precisions(form, arguments.rounds, layout)
        else:
            compare(form, arguments.rounds, layout, arguments.compile)


if __name__ == "__main__":
    main()

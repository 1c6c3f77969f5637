"""Our Inception against the plain way to run it: NCHW, each batch norm a layer of its own.

    python benchmarks/inception.py [--rounds 5] [--batch 8] [--threads 1]

Both hold the same (random) weights and see the same images in turn, up to the standard 2048
features. `rate` is images per CPU second; `ratio` is ours over plain, the median of the rounds.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm_ray.evaluation.features.inception import Inception, Unit
from ddpm_ray.evaluation.features.inception_weights import NORM_EPS


def ours() -> Inception:
    torch.manual_seed(0)
    network = Inception()
    for unit in network.modules():
        if isinstance(unit, Unit):
            nn.init.kaiming_normal_(unit.weight)  # keeps activations in range through 94 layers
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def plain(network: Inception) -> Inception:
    """The same function: each folded bias taken out again into a batch norm."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for parent in list(network.modules()):
        for name, unit in list(parent.named_children()):
            if isinstance(unit, Unit):
                setattr(parent, name, unfolded(unit))
    first = next(network.layers.children())
    first.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    return network.eval()


def unfolded(unit: Unit) -> nn.Module:
    conv = nn.Conv2d(
        unit.in_channels,
        unit.out_channels,
        unit.kernel_size,  # type: ignore[arg-type]
        unit.stride,  # type: ignore[arg-type]
        unit.padding,  # type: ignore[arg-type]
        bias=False,
    )
    norm = nn.BatchNorm2d(unit.out_channels, eps=NORM_EPS)
    assert norm.running_var is not None
    with torch.no_grad():
        conv.weight.copy_(unit.weight)
        norm.running_var.fill_(1 - NORM_EPS)
        assert unit.bias is not None
        norm.bias.copy_(unit.bias)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


def timed(network: Inception, images: Tensor) -> Callable[[], float]:
    def run() -> float:
        start_s = time.process_time()
        network.features(images)
        return len(images) / (time.process_time() - start_s)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randint(0, 256, (arguments.batch, 32, 32, 3), dtype=torch.uint8)
    folded = ours()
    networks = {"plain": plain(folded), "ours": folded}
    features = {name: network.features(images)[2048] for name, network in networks.items()}
    apart = (features["ours"] - features["plain"]).norm() / features["plain"].norm()
    runs = {name: timed(network, images) for name, network in networks.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            rates[name].append(run())
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    print("network  images per CPU s  ratio  range      features apart")
    print(f"plain    {statistics.median(rates['plain']):16.2f}")
    print(
        f"ours     {statistics.median(rates['ours']):16.2f}  {statistics.median(ratios):5.2f}  "
        f"{min(ratios):.2f}-{max(ratios):.2f}  {apart.item():.1e} relative"
    )


if __name__ == "__main__":
    main()

"""Time of a training step and of a sampler's network call by operation, ours and diffusers'.

    python -m benchmarks.unet_profile [--forms "2.2 M"]

The cases of `benchmarks.unet`. A line is one network in one case: milliseconds by kind of
operation, of torch.profiler, without the operations that each calls. `bound` is the time of
diffusers over that of our convolutions, matrix products and Adam alone: both networks call the same
kernels for these, so no change of the rest gives a greater ratio. One CPU thread.
"""

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.unet import COMPARED, FORMS, Run, ours, run_of, theirs

KINDS = {  # of an operation, by a part of its name; the first that is found
    "convolution": ("conv",),
    "product": ("addmm", "bmm", "aten::mm", "attention", "linear"),
    "adam": ("adam",),
    "norm": ("norm",),
    "silu": ("silu",),
    "copy": ("copy",),
}
SHARED = "convolution", "product", "adam"
CALLS = 3


def spent_ms(run: Run) -> Counter[str]:
    """Milliseconds of one call of `run` by kind of operation."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            run()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        parts = (kind for kind, names in KINDS.items() if any(n in event.key for n in names))
        found[next(parts, "other")] += event.self_cpu_time_total / CALLS / 1000
    return found


def line(name: str, found: Counter[str]) -> str:
    """The name, the total and each kind."""
    kinds = "".join(f" {found[kind]:11.0f}" for kind in (*KINDS, "other"))
    return f"{name:52} {sum(found.values()):6.0f}{kinds}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    forms = parser.parse_args().forms
    torch.set_num_threads(1)
    print(f"{'ms':52} {'total':>6}" + "".join(f" {kind:>11}" for kind in (*KINDS, "other")))
    for form in forms:
        base_channels, groups, batch = FORMS[form]
        for what, precision, its in COMPARED:
            case = f"{form} {what}"
            peer = spent_ms(run_of(what, theirs(base_channels, groups), batch, its))
            print(line(f"{case}, diffusers {its}", peer))
            for layout, suffix in ((torch.contiguous_format, ""), (torch.channels_last, " NHWC")):
                made = ours(base_channels, groups)
                found = spent_ms(run_of(what, made, batch, precision, layout))
                bound = sum(peer.values()) / sum(found[kind] for kind in SHARED)
                print(line(f"{case}, ours {precision}{suffix}", found) + f"   bound {bound:.2f}")


if __name__ == "__main__":
    main()

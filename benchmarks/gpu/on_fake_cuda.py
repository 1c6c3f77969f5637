"""The cases on fake CUDA tensors, and where a training step waits for its device, as JSON.

    python -m benchmarks.gpu.on_fake_cuda [--only score] [--write-golden]

`--write-golden` writes tests/golden/step_syncs.json: do so where a change is meant to add or remove
a wait, and say in the commit why.
"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import fake_library
from benchmarks.gpu.tiny_keys import (
    ADVERSARY,
    AUTOENCODER,
    CONTRASTIVE,
    EMBEDDED,
    LATENTS,
    PRIOR,
    STORED,
    TEXT,
    TRANSFORMER,
)

GOLDEN = Path(__file__).parents[2] / "tests/golden/step_syncs.json"
SETTINGS = {  # of the task, objective or training, whose steps wait in ways of their own
    "plain": [],
    "dropout and labels": ["model.dropout=0.1", "model.num_classes=4"],
    "bf16_weights": ["training.precision=bf16_weights"],
    "dit": ["model.network=dit"],
    "elastic": ["training.reduction=elastic", "training.reduction_slots=2"],
    "log_normal": ["objective.timesteps=log_normal"],
    "second_moment": [
        "objective.timesteps=second_moment",
        "objective.variance=learned",
        "objective.loss=vlb",
    ],
    "text": TEXT,
    "text transformer": [*TEXT, *TRANSFORMER],
    "contrastive": CONTRASTIVE,
    "latents": LATENTS,
    "decoder": EMBEDDED,
    "decoder of latents": [*LATENTS, *STORED],
    "prior": PRIOR,
    "autoencoder": AUTOENCODER,
    "autoencoder adversary": [*AUTOENCODER, *ADVERSARY],
}


def found(only: str = "", limit_s: float = 600) -> dict[str, Any]:
    """The output of this module, from its own process: "cases", "syncs" and "forward".

    A case is None where it works, else its error and place. "forward" is empty with `only`. Raises
    NoFakeCudaError.
    """
    command = [sys.executable, "-m", __spec__.name, "--only", only]
    done = subprocess.run(
        command,
        env=fake_library.environment(),
        cwd=Path(__file__).parents[2],
        text=True,
        stdout=subprocess.PIPE,
        timeout=limit_s,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def outcomes(only: str) -> dict[str, str | None]:
    """Return None, or the error and place, of each case. All are held to be deterministic."""
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.fake_cuda import fake_cuda
    from benchmarks.gpu.measured import deterministic

    results: dict[str, str | None] = {}
    for name, case in cases().items():
        if only in name:
            with fake_cuda() as device, deterministic():
                results[name] = outcome(lambda: case(device))  # noqa: B023  # called here
    return results


def outcome(action: Callable[[], None]) -> str | None:
    """Return None, or the error of `action` and the two innermost places in ddpm_ray on its way."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  # whatever it is, the other cases are still wanted
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            f"{frame.filename.rpartition('/ddpm_ray/')[2]} {frame.name}"
            for frame in reversed(frames)
            if "/ddpm_ray/" in frame.filename and frame.filename.endswith(".py")
        ]
        return f"{type(error).__name__}: {error} (in {' < '.join(places[:3]) or 'the case'})"
    return None


def syncs() -> dict[str, list[str]]:
    """Return, by setting, one line for each place where the second step and its device wait."""
    from benchmarks.gpu.fake_cuda import SYNCS, fake_cuda
    from benchmarks.gpu.tiny import SIDE, config_of, run_of
    from ddpm_ray.training.loop import take_step

    results = {}
    for name, keys in SETTINGS.items():
        with fake_cuda() as device:
            config = config_of([*keys, "training.steps=3"])  # the last one copies no next batch
            run = run_of(config, device, 24 if AUTOENCODER[0] in keys else SIDE)
            take_step(run)
            SYNCS.clear()
            take_step(run)
        results[name] = [
            f"{count} x {sync.kind}: {sync.module} {sync.function}: {sync.expression}"
            for sync, count in sorted(SYNCS.counts.items())
        ]
    return results


def forward_costs() -> dict[str, dict[str, int]]:
    """Return, by training.precision, what a forward pass of the CIFAR-10 form costs."""
    from benchmarks.gpu.fake_cuda import fake_cuda
    from benchmarks.gpu.forward_cost import forward_cost

    with fake_cuda() as device:
        return {name: forward_cost(name, device)._asdict() for name in ("bf16", "bf16_weights")}


def main() -> None:
    """Print one line of JSON; anew, where this process was not prepared for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--write-golden", action="store_true")
    arguments = parser.parse_args()
    library = str(fake_library.library())
    if library not in os.environ.get(fake_library.PRELOADED, ""):
        os.execve(sys.executable, sys.orig_argv, fake_library.environment())
    from benchmarks.gpu.fake_cuda import end_process

    if arguments.write_golden:
        GOLDEN.write_text(json.dumps(syncs(), indent=1) + "\n")
    else:
        costs = forward_costs() if not arguments.only else {}
        report = {"cases": outcomes(arguments.only), "syncs": syncs(), "forward": costs}
        print(json.dumps(report))
    end_process()


if __name__ == "__main__":
    main()

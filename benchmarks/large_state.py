"""A run whose state has some GB, watched by its driver with the shortest stall time-out, 5 s.

    python -m benchmarks.large_state [gigabytes] [seconds of stall time-out]

The run is `jobs/train.py` on the digits: a DiT of so many weights that they, their EMA and Adam's
moments take 4 GB by default, one worker, 6 steps, a checkpoint every 2. A driver that takes a
checkpoint for a stall kills its workers and starts them again: `restarts` must be 0. Needs two and
a half times the state in memory, three times on disk, and a machine with nothing else to do: under
load, workers are silent for other reasons. Starts a Ray of its own.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIGABYTES, STALL_S = 4.0, 5.0
STEPS, EVERY, DEPTH = 6, 2, 12
BYTES_PER_WEIGHT = 16  # float32: weights, EMA, two moments
WEIGHTS_PER_BLOCK = 18  # in squares of the width: attention 4, MLP 8, adaptive norms 6
HEADS = 16
ROOT = Path(__file__).parents[1]


def width(gigabytes: float) -> int:
    """Width of a DiT whose state has about that size: a multiple of the heads."""
    weights = gigabytes * 1e9 / BYTES_PER_WEIGHT
    return round(math.sqrt(weights / (WEIGHTS_PER_BLOCK * DEPTH)) / HEADS) * HEADS


def options(folder: str, gigabytes: float, stall_s: float) -> list[str]:
    """Options of the run."""
    return [
        "name=large",
        f"storage={folder}/runs",
        f"data.url={folder}/digits",
        "data.source=digits",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "model.network=dit",
        "model.patch_size=2",
        f"model.hidden_size={width(gigabytes)}",
        f"model.depth={DEPTH}",
        f"model.heads={HEADS}",
        f"training.steps={STEPS}",
        "training.global_batch_size=2",
        f"training.checkpoint_every_steps={EVERY}",
        "training.keep_checkpoints=2",
        "training.log_every_steps=1",
        "training.grid_every_steps=0",
        "evaluation.num_images=0",
        "cluster.num_workers=1",
        "cluster.cpus_per_worker=1",
        f"cluster.stall_timeout_s={stall_s}",
    ]


def main(gigabytes: float, stall_s: float) -> None:
    """Train, and print restarts and what was committed."""
    with tempfile.TemporaryDirectory(prefix="large", dir="/tmp") as folder:
        began = time.perf_counter()
        config = Path(folder, "large.yaml")
        config.write_text("task: denoiser\n")
        command = [sys.executable, str(ROOT / "jobs/train.py"), str(config)]
        ended = subprocess.run(
            [*command, *options(folder, gigabytes, stall_s)],
            text=True,
            capture_output=True,
            timeout=1800,
            check=False,
        )
        log = ended.stderr
        if ended.returncode:
            sys.exit(log)
        newest = Path(json.loads(ended.stdout.splitlines()[-1])["checkpoint"])
        size = sum(file.stat().st_size for file in newest.iterdir())
        print(f"state of a checkpoint  {size / 1e9:.2f} GB")
        print(f"steps, checkpoints     {STEPS}, {STEPS // EVERY}")
        print(f"stall time-out         {stall_s:g} s")
        print(f"restarts               {log.count('restarting the worker group')}")
        print(f"seconds in all         {time.perf_counter() - began:.0f}")


if __name__ == "__main__":
    given = [float(one) for one in sys.argv[1:]]
    main(given[0] if given else GIGABYTES, given[1] if len(given) > 1 else STALL_S)

"""A run that is killed and restarted, beside the same run that was not, in processes of their own.

    python -m benchmarks.gpu.restarted FOLDER [--kill-after 17] [--toy] [key=value ...]

It goes on from the newest checkpoint in FOLDER and prints the sha256 of its weights as they are
after the last step; with `--kill-after` it kills itself after that step.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.tiny import config_of, run_of
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.training import determinism
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.loop import report, save, take_step

ROOT = Path(__file__).parents[2]
STEPS, EVERY, KILLED_AFTER = 30, 10, 17


def compared(keys: list[str], *, toy: bool, limit_s: float) -> dict[str, bool]:
    """Whether a second run, and one that was killed and restarted, end in the first one's bits."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (_ran(f"{folder}/{name}", keys, toy, limit_s) for name in ("a", "b"))
        _ran(f"{folder}/c", [f"--kill-after={KILLED_AFTER}", *keys], toy, limit_s)
        third = _ran(f"{folder}/c", keys, toy, limit_s)
    return {"equal when repeated": second == first, "equal after a restart": third == first}


def _ran(folder: str, arguments: list[str], toy: bool, limit_s: float) -> str:
    """Its output."""
    command = [sys.executable, "-m", __spec__.name, folder, *arguments]
    done = subprocess.run(
        command + (["--toy"] if toy else []),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        timeout=max(1.0, limit_s),
    )
    wanted = -signal.SIGKILL if any("--kill-after" in word for word in arguments) else 0
    if done.returncode != wanted:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}, not {wanted}")
    return done.stdout.strip()


def main() -> None:
    """Train; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_intermixed_args()
    device = torch.device("cpu" if arguments.toy else "cuda")
    if arguments.toy:
        config = config_of(["model.dropout=0.1", *arguments.keys])
    else:
        wanted = ["data.url=none", "training.precision=bf16", *arguments.keys]
        config = load_config(RunConfig, str(ROOT / "conf/train/cifar10.yaml"), wanted)
    if config.training.deterministic:
        os.environ.update(determinism.ENVIRONMENT)  # read when CUDA is first used, below
        determinism.configure()
    run = run_of(config, device, 8 if arguments.toy else 32, arguments.folder)
    if found := CheckpointStore(arguments.folder).load():
        run.state.restore(found[1])
    while run.state.step < STEPS:
        take_step(run)
        if run.state.step % EVERY == 0:
            report(run)
            save(run)
            run.checkpoints.wait()
        if run.state.step == arguments.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    print(_sha256(run.state.model))


def _sha256(network: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()

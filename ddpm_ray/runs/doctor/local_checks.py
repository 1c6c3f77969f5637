"""Checks of this machine, where a run starts a local Ray: without Ray, and without torch if it can.

Both take seconds to import, and more than the doctor's time-out on a busy machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.redaction import counted
from ddpm_ray.runs.doctor.checks import Finding

MOST_NAMED = 3  # names in a line; the rest are counted
DEVICES = Path("/dev")
OTHER_GPUS = ("dxg", "kfd")  # devices of GPUs under WSL, and of AMD's


def ray_address(config: DoctorConfig) -> str:
    """Return the address of the cluster to join; "" for a local Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def local_ray() -> Iterator[Finding]:
    """Check this machine as the only node."""
    cpus = counted(os.cpu_count() or 1, "CPU")
    yield Finding("Ray", "ok", f"no address: a run starts a local Ray on this machine ({cpus})")
    nvidia = [path for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()]
    found = nvidia or any((DEVICES / name).exists() for name in OTHER_GPUS)
    yield gpus_agree([("this machine", torch_gpus() if found else 0, len(nvidia))])


def torch_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    import torch  # takes seconds

    return torch.cuda.device_count()


def gpus_agree(found: list[tuple[str, int, int]]) -> Finding:
    """Compare torch's and Ray's number of GPUs on each node, (name, torch's, Ray's)."""
    fewer = [f"{name}: torch sees {a}, Ray {b}" for name, a, b in found if a < b]
    more = [f"{name}: torch sees {a}, Ray {b}" for name, a, b in found if a > b]
    if fewer:
        remedy = (
            "install torch's CUDA build and the NVIDIA driver there: `nvidia-smi` must list them"
        )
        return Finding("GPUs", "fail", named(fewer, "; "), remedy)
    if more:
        remedy = "start that node with `ray start --num-gpus=N` to use all"
        return Finding("GPUs", "warn", named(more, "; "), remedy)
    total = sum(seen for _, seen, _ in found)
    return Finding(
        "GPUs", "ok", f"{total}; torch and Ray agree" if total else "none: training on CPUs"
    )


def named(names: list[str], separator: str = ", ") -> str:
    """Join the first few of `names`, and say how many more there are."""
    rest = len(names) - MOST_NAMED
    return separator.join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")

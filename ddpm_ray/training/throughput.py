"""Use of a worker's device: operations per second, share of the device's peak, memory."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ddpm_ray.reporting import MFU, PEAK_MEMORY, STEP_MS, TFLOPS
from ddpm_ray.training.step_clock import StepClock

# Dense bf16 matrix products in TFLOP/s, by a part of the device's name; from NVIDIA's data sheets.
# The first that fits is taken.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
}


def peak_tflops(device: torch.device, stated: float = 0.0) -> float:
    """Peak of the device's dense bf16 matrix products in TFLOP/s; 0 if it is not known.

    `stated`, where it is above 0, is taken instead of the table.
    """
    if stated or device.type != "cuda":
        return stated
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


@dataclass
class DeviceUse:
    """Measures the main worker's device; metrics of a window of steps."""

    clock: StepClock
    device: torch.device
    operations: int  # of a training step, for one image; 0: not counted
    peak_tflops: float = 0.0  # of the device; 0: not known

    def metrics(self, images: float, steps: int, elapsed_s: float) -> Iterator[tuple[str, float]]:
        """Yield the metrics of the window that ends now; `images` are those of this worker."""
        for key, seconds in zip(STEP_MS, self.clock.collect().values(), strict=True):
            yield key, 1e3 * seconds / max(steps, 1)
        tflops = images * self.operations / max(elapsed_s, 1e-9) / 1e12
        if self.operations:
            yield TFLOPS, tflops
        if self.operations and self.peak_tflops:
            yield MFU, tflops / self.peak_tflops
        yield PEAK_MEMORY, peak_memory_gb(self.device)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in GB (1e9 bytes) that this process has used: of its GPU, or without one of RAM.

    That of a GPU counts from the last call, that of the host from the start of the process.
    """
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9

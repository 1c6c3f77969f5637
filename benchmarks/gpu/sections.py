"""The sections of gpu_check.py, each in a process of its own: `python -m benchmarks.gpu.sections`.

A section yields rows as it finds them, and each leaves as a line of JSON at once: what was measured
before an error, or before the section's time was over, is kept.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.gpu import on_fake_cuda, restarted
from benchmarks.gpu.cases import cases as all_cases
from benchmarks.gpu.fake_library import NoFakeCudaError
from benchmarks.gpu.measured import busy, deterministic, flops, matmul_rate, repeated, wait
from benchmarks.gpu.tiny import SIDE, config_of, run_of
from benchmarks.gpu.tiny_keys import BATCH
from ddpm_ray.assembly import networks
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.counter_rng import Purpose, derived_seed, normal
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.evaluation.features.inception import Inception, Unit
from ddpm_ray.training.loop import save, take_step
from ddpm_ray.training.objective import Objective
from ddpm_ray.training.run import Run

ROOT = Path(__file__).parents[2]
CIFAR = str(ROOT / "conf/train/cifar10.yaml")
LARGE = [  # the 256-pixel network of Ho et al. 2020, appendix B
    "model.channel_mults=[1,1,2,2,4,4]",
    "model.dropout=0",
    "data.flip=false",
]
PRECISIONS = {
    "fp32": [],
    "bf16": ["training.precision=bf16"],
    "bf16_weights channels_last": [
        "training.precision=bf16_weights",
        "training.channels_last=true",
    ],
}


Value: TypeAlias = float | bool | str


class Row(NamedTuple):
    """One measurement: values by unit; none where `note` says why."""

    name: str
    found: dict[str, Value]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """The device and time limit of a section."""

    device: torch.device
    toy: bool  # sizes at which a CPU tries the script: no figure means anything
    until: float  # of time.monotonic

    @property
    def left_s(self) -> float:
        """Seconds that the section still has."""
        return self.until - time.monotonic()

    @property
    def side(self) -> int:
        """Side of the CIFAR-10 images."""
        return SIDE if self.toy else 32

    def batches(self, *counts: int) -> tuple[int, ...]:
        """Images a step: of a toy one small number."""
        return (BATCH,) if self.toy else counts

    @property
    def round_s(self) -> float:
        """The time for which one operation is repeated."""
        return 0.05 if self.toy else 2.0

    def run(self, batch: int, side: int, *keys: str, url: str = "memory://none") -> Run:
        """A run of the CIFAR-10 form of Ho et al. with `keys`; of a toy its small relative."""
        config = self.config(f"training.global_batch_size={batch}", *keys)
        run = run_of(config, self.device, side, url)
        if config.training.compile != "off":
            torch.compiler.reset()
            backend = "eager" if self.toy else "inductor"
            run.network = torch.compile(run.state.network, backend=backend)  # type: ignore[assignment]
            if self.toy and isinstance(run.objective, Objective):
                eager = replace(run.objective.noising, compiled=False)
                run.objective = replace(run.objective, noising=eager)
        return run

    def config(self, *keys: str) -> RunConfig:
        """The config of `run`."""
        if self.toy:
            return config_of([key for key in keys if "channel_mults" not in key])
        return load_config(RunConfig, CIFAR, ["data.url=none", *keys])


Section: TypeAlias = Callable[[Place], Iterator[Row]]


def cases(place: Place) -> Iterator[Row]:
    """All operations of a run on its device, small: the cases of the tests."""
    try:
        results = _on_cuda(place) if place.device.type == "cuda" else _on_fake_cuda(place)
    except NoFakeCudaError as error:
        yield Row("cases", {}, f"not run: {error}")
        return
    broken = {name: problem for name, problem in results.items() if problem is not None}
    yield Row("cases", {"work": len(results) - len(broken), "fail": len(broken)})
    yield from (Row(name, {"works": False}, problem) for name, problem in broken.items())
    if place.device.type == "cuda":
        yield Row("waits for the device", {"a step": _waits(place.device)})
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(results)} cases fail")


def _on_fake_cuda(place: Place) -> dict[str, str | None]:
    results: dict[str, str | None] = on_fake_cuda.found(limit_s=max(1.0, place.left_s))["cases"]
    return _with_pillow(results)


def _on_cuda(place: Place) -> dict[str, str | None]:
    def whole(case: Callable[[torch.device], None]) -> None:
        case(place.device)
        wait(place.device)

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    acts = {name: partial(whole, case) for name, case in all_cases().items()}
    results = {name: on_fake_cuda.outcome(act) for name, act in acts.items()}
    with deterministic():
        results |= {
            f"deterministic, {name}": on_fake_cuda.outcome(act) for name, act in acts.items()
        }
    return _with_pillow(results)


def _with_pillow(results: dict[str, str | None]) -> dict[str, str | None]:
    """Remove failures of pictures where Pillow is not installed."""
    missing = "No module named 'PIL'"
    return {name: problem for name, problem in results.items() if missing not in (problem or "")}


def _waits(device: torch.device) -> int:
    """Number of times that a step makes the host wait, as torch's own debug mode counts it."""
    run = run_of(config_of([]), device)
    take_step(run)
    wait(device)
    with warnings.catch_warnings(record=True) as results:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in results)


def steps(place: Place) -> Iterator[Row]:
    """Training steps of the CIFAR-10 form, whole: with clip, Adam, EMA and log."""
    limits = yield from _limits(place, place.side)
    for batch in place.batches(128, 16, 512):
        for name, keys in PRECISIONS.items():
            yield from _stepped(place, f"{name}, batch {batch}", keys, batch, place.side, limits)


def idle(place: Place) -> Iterator[Row]:
    """The share of a step in which the device is idle."""
    for name, keys in PRECISIONS.items():
        for batch in place.batches(16, 128):
            run = place.run(batch, place.side, *keys)
            seen = busy(partial(take_step, run), place.device, 3)
            share = round(100 * seen.idle_share, 1)
            yield Row(f"{name}, batch {batch}", {"% idle": share, "kernels a step": seen.kernels})


def compiled(place: Place) -> Iterator[Row]:
    """The same steps with torch.compile, and what its warm-up costs."""
    limits = yield from _limits(place, place.side)
    for batch in place.batches(128, 512, 16):
        precision = "bf16_weights channels_last"
        keys = [*PRECISIONS[precision], "training.compile=default"]
        begun, name = time.perf_counter(), f"{precision} compile, batch {batch}"
        yield from _stepped(place, name, keys, batch, place.side, limits, needs_s=45)
        yield Row(f"{name}: all of it", {"s": round(time.perf_counter() - begun, 1)})


def large(place: Place) -> Iterator[Row]:
    """The 256-pixel form at batch 16."""
    side, batch = (SIDE, BATCH) if place.toy else (256, 16)
    limits = yield from _limits(place, side, *LARGE)
    for name, keys in PRECISIONS.items():
        keys = [*LARGE, *keys]
        yield from _stepped(place, f"{name}, batch {batch}", keys, batch, side, limits)


class Limits(NamedTuple):
    """The limits that a step is compared with."""

    bf16_rate: float  # FLOP/s of large products, as measured here
    work: int  # FLOP of an image's training step


def _limits(place: Place, side: int, *keys: str) -> Generator[Row, None, Limits]:
    size = 128 if place.toy else 8192
    rate = matmul_rate(torch.bfloat16, place.device, size, place.round_s / 2)
    yield Row(f"bf16 products, {size} x {size}", {"TFLOP/s": round(rate / 1e12, 3)})
    network = networks.network(place.config(*keys), ImageShape(side, side, 3)).to(place.device)
    x_t = torch.randn(1, 3, side, side, device=place.device)
    t = torch.tensor([1], device=place.device)
    work = flops(lambda: network(x_t, t).square().mean())
    yield Row("a training step", {"GFLOP an image": round(work / 1e9, 3)})
    return Limits(rate, work)


def _stepped(
    place: Place,
    name: str,
    keys: list[str],
    batch: int,
    side: int,
    limits: Limits,
    needs_s: float = 8,
) -> Iterator[Row]:
    if not place.toy and place.left_s < needs_s:
        yield Row(name, {}, "not run: the section's time was over")
        return
    on_cuda = place.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run = place.run(batch, side, *keys)
        rate = repeated(partial(take_step, run), place.device, place.round_s)
    except torch.OutOfMemoryError:
        yield Row(name, {}, "not run: the GPU's memory is too small")
        return
    found: dict[str, Value] = {
        "images/s": round(1e3 * batch / rate.ms, 1),
        "ms/step": round(rate.ms, 2),
        "% of bf16 products": round(1e5 * batch * limits.work / rate.ms / limits.bf16_rate, 1),
    }
    if on_cuda:
        found["GiB at most"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    yield Row(name, found)


def parts(place: Place) -> Iterator[Row]:
    """The parts of a step other than the network."""
    device = place.device
    shapes = [(4, 3, 8, 8)] if place.toy else [(128, 3, 32, 32), (32, 3, 256, 256)]
    for count, *shape in shapes:
        at = torch.arange(count, device=device)
        ours = repeated(partial(normal, 0, Purpose.NOISE, 1, at, tuple(shape)), device, 0.5)
        theirs = repeated(partial(torch.randn, count, *shape, device=device), device, 0.5)
        name = f"noise, {'x'.join(map(str, (count, *shape)))}"
        yield Row(name, {"ms Philox": _ms(ours.ms), "ms torch.randn": _ms(theirs.ms)})
    seed = repeated(partial(derived_seed, 0, Purpose.DROPOUT, 1, 0), device, 0.3)
    yield Row("a seed for dropout", {"ms": _ms(seed.ms)})
    run = place.run(place.batches(16)[0], place.side)
    batch = run.stream.batch(0)
    run.objective.backward(run.network, batch, 0, run.workers, 16)
    acts: dict[str, Callable[[], object]] = {
        "clip": partial(clip_grad_norm_, list(run.network.parameters()), 1.0, foreach=True),
        "Adam": run.state.optimizer.step,
        "EMA": partial(run.state.ema.update, run.state.model, 0.999),
    }
    for name, act in acts.items():
        yield Row(name, {"ms": _ms(repeated(act, device, place.round_s / 4).ms)})


def _ms(value: float) -> float:
    return round(value, 4)


def checkpoint(place: Place) -> Iterator[Row]:
    """The time for which a checkpoint blocks the steps, and its total time."""
    with tempfile.TemporaryDirectory() as folder:
        run = place.run(place.batches(128)[0], place.side, "training.precision=bf16", url=folder)
        alone = repeated(partial(take_step, run), place.device, place.round_s).ms
        begun = time.perf_counter()
        save(run)
        stall_s, steps_meanwhile = time.perf_counter() - begun, 0
        while (run.checkpoints.committed is None and place.left_s > 3) or not steps_meanwhile:
            take_step(run)
            wait(place.device)
            steps_meanwhile += 1
        while_written = (time.perf_counter() - begun - stall_s) / steps_meanwhile
        run.checkpoints.wait()
        whole_s = time.perf_counter() - begun
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    yield Row("checkpoint", {"MB": round(size / 1e6, 1), "s until written": round(whole_s, 2)})
    yield Row("steps are held up", {"ms": round(1e3 * stall_s, 1)})
    yield Row("a step", {"ms": round(alone, 2), "ms meanwhile": round(1e3 * while_written, 2)})


def restart(place: Place) -> Iterator[Row]:
    """Whether a run that is killed and restarted ends in the bits of one that was not."""
    is_known = any(field.name == "deterministic" for field in fields(TrainingConfig))
    for wanted in (False, True):
        name = f"training.deterministic={str(wanted).lower()}"
        if wanted and not is_known:
            yield Row(name, {}, "not run: this version has no such key")
            return
        keys = [name] if is_known else []
        found = restarted.compared(keys, toy=place.toy, limit_s=place.left_s)
        yield Row(name, dict(found))
        if wanted and not all(found.values()):
            raise RuntimeError(f"{name}: the same run ended in other bits")


def inception(place: Place) -> Iterator[Row]:
    """The FID network with random weights: how far TF32 moves its features, and its speed."""
    network = _random_inception().to(place.device)
    count = 2 if place.toy else 64
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, device=place.device)
    seen = {}
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.inference_mode():
            seen[tf32] = network.features(images)[2048].double()
            rate = repeated(partial(network.features, images), place.device, place.round_s)
        name = "TF32" if tf32 else "fp32"
        yield Row(f"features in {name}", {"images/s": round(1e3 * count / rate.ms, 1)})
    apart = (seen[True] - seen[False]).abs() / seen[False].abs().mean()
    found: dict[str, Value] = {"mean": _brief(apart.mean()), "largest": _brief(apart.max())}
    yield Row("TF32 from fp32, over the mean feature", found)


def _brief(value: Tensor) -> float:
    return float(f"{float(value):.3g}")


def _random_inception() -> Inception:
    torch.manual_seed(0)
    network = Inception()
    for unit in network.modules():
        if isinstance(unit, Unit):
            nn.init.kaiming_normal_(unit.weight)  # keeps activations in range through 94 layers
    return network.eval()


SECTIONS: dict[str, Section] = {
    "cases": cases,
    "steps": steps,
    "idle": idle,
    "compiled": compiled,
    "large": large,
    "parts": parts,
    "checkpoint": checkpoint,
    "restart": restart,
    "inception": inception,
}


def main() -> None:
    """Print rows as lines of JSON, and an error as the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("limit_s", type=float)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.toy else "cuda")
    place = Place(device, arguments.toy, time.monotonic() + arguments.limit_s)
    try:
        for row in SECTIONS[arguments.section](place):
            print(json.dumps(row._asdict()), flush=True)
    except Exception as error:  # noqa: BLE001  # what it found before is kept
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
        sys.exit(1)


if __name__ == "__main__":
    main()

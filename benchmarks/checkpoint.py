"""The cost of a checkpoint for the training thread and in memory, beside safetensors.save.

    python benchmarks/checkpoint.py [megabytes] [rounds]
    python benchmarks/checkpoint.py shared [megabytes] [workers]

The state has 1,520 tensors: weights, EMA and Adam's moments, by default 572 MB as the CIFAR-10
network of Ho et al. has. `whole`: each tensor is copied in the training thread and the file comes
from safetensors.save. `streamed`: what a run does. Each measurement is a process of its own, the
kinds in turn; medians. While a thread saves, the training thread wakes once a millisecond:

    stall       longest time between two wakings; `idle` is the same without a save
    held        most CPU time of the saving thread between two wakings, which bounds how long it
                held the interpreter's lock, also on a machine with other work
    snapshot    CPU time of the training thread for the copy
    memory      peak resident memory over the state, in sizes of the state

`shared`: a save by several workers (processes, over gloo) and a restart from it, by default of
4,000 MB by 2. Files have at most an eighth of the state, so that a small one is shared as well.
Takes two and a half times the state in memory for each worker. Of the worst worker:

    stall       as above
    silent      longest time between two heartbeats, which cluster.stall_timeout_s limits
    update      from the begin of a save to when an update may change the state; training computes
                gradients meanwhile
    memory      as above
    written     MB by each worker, in the second save
    read        MB by each worker, at the restart; `read_of_state` is their sum over the state
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from safetensors import torch as safetensors
from torch import Tensor, nn

from ddpm_ray.collectives import Workers
from ddpm_ray.distributed.heartbeat import Heartbeat, HeartbeatSender
from ddpm_ray.storage import object_store
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.background_copy import BackgroundCopy
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.shared_reading import load_newest
from ddpm_ray.training.state import Snapshot, TrainingState
from ddpm_ray.training.writer_lease import Lease

Groups = dict[str, dict[str, Tensor]]
TENSORS = {"model": 304, "ema": 304, "optimizer": 912}
TICK_S = 0.001


def made(megabytes: float) -> Groups:
    """A state of about that size."""
    each = round(megabytes * 1e6 / 4 / sum(TENSORS.values()))
    return {
        group: {f"layer{i}.weight": torch.ones(each) for i in range(count)}
        for group, count in TENSORS.items()
    }


def whole(groups: Groups, folder: str) -> Callable[[], None]:
    """Copy tensor by tensor; return what saves the copy in a thread."""
    copies = {
        group: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }

    def save() -> None:
        files = {group: safetensors.save(tensors) for group, tensors in copies.items()}
        for group, data in files.items():
            hashlib.sha256(data)
            object_store.write_bytes(object_store.join(folder, group), data)

    return save


_copy = BackgroundCopy()


def streamed(groups: Groups, folder: str) -> Callable[[], None]:
    """Start the copy; return what saves it in a thread."""
    copies = _copy.start(groups)

    def save() -> None:
        _copy.finish()
        CheckpointStore(folder, keep=2).save(Snapshot(copies, {"step": 1}))

    return save


def longest(save: Callable[[], None]) -> tuple[float, float]:
    """Longest seconds between two wakings while `save` runs, and most CPU time of it."""
    thread = threading.Thread(target=save)
    thread.start()
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    stall_s, held_s, last_s, last_cpu_s = 0.0, 0.0, time.perf_counter(), 0.0
    while thread.is_alive():
        time.sleep(TICK_S)
        try:
            cpu_s = time.clock_gettime(clock)
        except OSError:  # it has just ended
            break
        now_s = time.perf_counter()
        stall_s, held_s = max(stall_s, now_s - last_s), max(held_s, cpu_s - last_cpu_s)
        last_s, last_cpu_s = now_s, cpu_s
    return stall_s, held_s


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(kind: str, megabytes: float) -> dict[str, float]:
    """Save twice in this process, as the first copy gets its memory; measure the second."""
    torch.set_num_threads(1)
    start = {"whole": whole, "streamed": streamed}[kind]
    groups = made(megabytes)
    size = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    with tempfile.TemporaryDirectory() as folder:
        start({"model": {"w": torch.zeros(1)}}, folder)()  # imports
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = memory("VmRSS")
        longest(start(groups, folder))
        began_s = time.thread_time()
        save = start(groups, folder)
        snapshot_s = time.thread_time() - began_s
        stall_s, held_s = longest(save)
        peak = (memory("VmHWM") - before) / size
        idle_s, _ = longest(lambda: time.sleep(1.0))
    return {
        "stall_ms": 1e3 * stall_s,
        "idle_ms": 1e3 * idle_s,
        "held_ms": 1e3 * held_s,
        "snapshot_ms": 1e3 * snapshot_s,
        "memory": peak,
    }


def trained(megabytes: float) -> TrainingState:
    """A state of about that size: weights, EMA and Adam's moments."""
    count = TENSORS["model"]
    each = round(megabytes * 1e6 / 4 / 4 / count)
    model = nn.ParameterList(nn.Parameter(torch.ones(each)) for _ in range(count))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainingState(model, EMA(model), optimizer, {}, step=1)


class Traffic:
    """Bytes that this process writes to the storage and reads from it."""

    def __init__(self) -> None:
        self.written = self.read = 0
        self._write, self._read = object_store.write_bytes, object_store.read_bytes
        object_store.write_bytes = self._writing
        object_store.read_bytes = self._reading

    def _writing(self, url: str, data: bytes | memoryview) -> None:
        self.written += len(data)
        self._write(url, data)

    def _reading(self, url: str, size_bytes: int = object_store.UNKNOWN_BYTES) -> bytes:
        data = self._read(url, size_bytes)
        self.read += len(data)
        return data


def worker(rank: int, count: int, megabytes: float, folder: str) -> dict[str, float]:
    """Save twice and restart as one of `count` workers; measure the second save."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    workers, beats, traffic = Workers(rank, count), list[float](), Traffic()
    state, store = trained(megabytes), CheckpointStore(f"{folder}/run", keep=2)
    size = state.checkpoint_bytes()
    checkpoint_parts.PART_BYTES = min(checkpoint_parts.PART_BYTES, size // 8)
    if workers.is_main:
        store.acquire_lease(Lease.first(store.url))
    store.lease = workers.gather(store.lease)[0]
    writer = CheckpointWriter(store)

    def note(heartbeat: Heartbeat) -> None:
        beats.append(time.perf_counter())

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory("VmRSS")
    writer.save(state, [], workers)
    writer.wait()
    workers.gather(None)
    traffic.written = 0
    sender = HeartbeatSender(rank, note, count)
    sender.start()
    began_s = time.perf_counter()
    writer.save(state, [], workers)
    state.background_copy.before_update()
    update_s = time.perf_counter() - began_s
    stall_s, _ = longest(writer.wait)
    saved_s = time.perf_counter() - began_s
    sender.stop()
    silent_s = max(b - a for a, b in zip(beats, [*beats[1:], time.perf_counter()], strict=True))
    peak = (memory("VmHWM") - before) / size
    written = traffic.written
    del state, writer  # the restart is that of other processes
    workers.gather(None)
    traffic.read = 0
    load_newest(CheckpointStore(store.url), workers)
    return {
        "stall_ms": 1e3 * stall_s,
        "silent_s": silent_s,
        "update_ms": 1e3 * update_s,
        "saved_s": saved_s,
        "memory": peak,
        "written_mb": written / 1e6,
        "read_mb": traffic.read / 1e6,
    }


def shared(megabytes: float, count: int) -> dict[str, object]:
    """Results of the workers in one: of times and memory the worst, of bytes all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "worker", str(count), str(megabytes), folder]
        started = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        found = [json.loads(one.communicate()[0]) for one in started]
    by_key = {key: [round(one[key], 2) for one in found] for key in found[0]}
    traffic = {key: by_key.pop(key) for key in ("written_mb", "read_mb")}
    worst = {key: max(values) for key, values in by_key.items()}
    return {**worst, **traffic, "read_of_state": round(sum(traffic["read_mb"]) / megabytes, 2)}


def main() -> None:
    """Print one line of JSON for each kind."""
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], float(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["worker"]:
        workers, large, folder, rank = sys.argv[2:6]
        print(json.dumps(worker(int(rank), int(workers), float(large), folder)))
        return
    if sys.argv[1:2] == ["shared"]:
        size = float(sys.argv[2]) if len(sys.argv) > 2 else 4000
        count = int(sys.argv[3]) if len(sys.argv) > 3 else 2
        print(json.dumps({"kind": "shared", "megabytes": size, **shared(size, count)}))
        return
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 572
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    found: dict[str, list[dict[str, float]]] = {"whole": [], "streamed": []}
    for _ in range(rounds):
        for kind, results in found.items():
            command = [sys.executable, __file__, "measure", kind, str(megabytes)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout))
    for kind, results in found.items():
        medians = {key: round(median(one[key] for one in results), 2) for key in results[0]}
        print(json.dumps({"kind": kind, "megabytes": megabytes, **medians}), flush=True)


if __name__ == "__main__":
    main()

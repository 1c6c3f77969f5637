"""All workers read a checkpoint together: each byte once, and the same one for all."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray import collectives
from ddpm_ray.collectives import Workers
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import GROUPS, CheckpointError
from ddpm_ray.training.checkpoint_parts import shares
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.shared_reading import load_newest, read_together
from ddpm_ray.training.state import Snapshot
from tests.fixtures.unreadable import make_unreadable
from tests.limits import ENDS_S
from tests.training.test_damaged_checkpoints import flip

ROOT = Path(__file__).parents[2]


@dataclass
class Meeting:
    """What the threads of one group of workers exchange."""

    count: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=ENDS_S)


class Threads(Workers):
    """Workers that are threads of one process."""

    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = [self.meeting.values[rank] for rank in range(self.count)]
        self.meeting.barrier.wait()
        return values

    def broadcast_bytes(self, data: bytes | None, size: int, source: int) -> bytes:
        sent = self.gather(data)
        assert [rank for rank, one in enumerate(sent) if one is not None] == [source]
        assert len(sent[source]) == size
        return bytes(sent[source])


def on_all(count: int, act: Callable[[Workers], Any]) -> list[Any]:
    """What `act` returns or raises on each of `count` workers."""
    meeting = Meeting(count)

    def one(rank: int) -> Any:
        workers = Threads(rank, count)
        object.__setattr__(workers, "meeting", meeting)
        try:
            return act(workers)
        except (CheckpointError, StorageError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Reads:
    """Counts what is read of each checkpoint file, in bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        read = object_store.read_bytes

        def counted(url: str, *size: int) -> bytes:
            data = read(url, *size)
            self.done.append((url, len(data)))
            return data

        patch.setattr(object_store, "read_bytes", counted)

    def of(self, folder: str) -> dict[str, list[int]]:
        """Sizes of all reads in `folder`, by file name."""
        found: dict[str, list[int]] = {}
        for url, size in self.done:
            if url.startswith(folder + "/"):
                found.setdefault(object_store.name_of(url), []).append(size)
        return found


def saved(folder: Path, *steps: int) -> list[str]:
    store = CheckpointStore(str(folder))
    tensors = {
        step: {group: {"w": torch.randn(3 + number, 50)} for number, group in enumerate(GROUPS)}
        for step in steps
    }
    return [store.save(Snapshot(tensors[step], {"step": step})) for step in steps]


def same(one: Snapshot, other: Snapshot) -> bool:
    return one.facts == other.facts and all(
        torch.equal(one.tensors[group]["w"], other.tensors[group]["w"]) for group in GROUPS
    )


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_start_reads_each_byte_once(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, newest = saved(tmp_path, 5, 10)
    wanted = CheckpointStore(str(tmp_path)).load()
    assert wanted is not None
    reads = Reads(monkeypatch)
    found = on_all(count, lambda workers: load_newest(CheckpointStore(str(tmp_path)), workers))
    assert [where for where, _ in found] == [newest] * count
    assert all(same(snapshot, wanted[1]) for _, snapshot in found)
    files = {path.name: [path.stat().st_size] for path in Path(newest).iterdir()}
    assert reads.of(newest) == files


@pytest.mark.parametrize("damaged", ["ema.safetensors", "state.json", "manifest.json"])
def test_all_go_back_to_the_same_checkpoint(damaged: str, tmp_path: Path) -> None:
    """Whoever of them read the file that is damaged."""
    before, newest = saved(tmp_path, 5, 10)
    flip(Path(newest, damaged))
    found = on_all(3, lambda workers: load_newest(CheckpointStore(str(tmp_path)), workers))
    assert [(where, snapshot.step) for where, snapshot in found] == [(before, 5)] * 3


def test_no_checkpoint_is_none_for_all(tmp_path: Path) -> None:
    assert on_all(2, lambda workers: load_newest(CheckpointStore(str(tmp_path)), workers)) == [
        None,
        None,
    ]


def test_one_that_cannot_read_its_file_ends_the_read_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (where,) = saved(tmp_path, 5)
    make_unreadable(monkeypatch, "model.safetensors", "no route to host")
    errors = on_all(3, lambda workers: read_together(where, workers))
    assert {str(error) for error in errors} == {
        f"{where}/model.safetensors: no route to host; try again"
    }


@given(st.lists(st.integers(0, 10**6), max_size=12), st.integers(1, 8))
def test_shares_are_fair(sizes: list[int], count: int) -> None:
    """No worker has more than the mean and one file: the bound of any greedy schedule."""
    files = {str(number): size for number, size in enumerate(sizes)}
    found, loads = shares(files, count), [0] * count
    for name, size in files.items():
        loads[found[name]] += size
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0)


def gloo_worker(rank: int, folder: Path) -> dict[str, Any]:
    """Read together with another process; broadcast in several parts."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    workers = Workers(rank, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "BROADCAST_BYTES", 100)
        reads = Reads(patch)
        found = load_newest(CheckpointStore(str(folder / "run")), workers)
        assert found is not None
        sent = bytes(range(256)) if rank == 1 else None
        received = workers.broadcast_bytes(sent, 256, 1)
        empty = workers.broadcast_bytes(b"" if rank == 0 else None, 0, 0)
    dist.destroy_process_group()
    alone = CheckpointStore(str(folder / "run")).load()
    assert alone is not None
    return {
        "where": found[0],
        "same": same(found[1], alone[1]),
        "received": received.hex(),
        "empty": empty.hex(),
        "reads": reads.of(found[0]),
    }


@pytest.mark.timeout(400)  # both import torch anew
def test_two_processes_read_each_file_once_over_gloo(tmp_path: Path) -> None:
    before, newest = saved(tmp_path / "run", 5, 10)
    flip(Path(newest, "optimizer.safetensors"))
    command = [sys.executable, "-m", "tests.training.test_shared_reading"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    one, other = (json.loads(worker.communicate()[0]) for worker in workers)
    assert one["where"] == other["where"] == before
    assert one["same"]
    assert other["same"]
    assert one["received"] == other["received"] == bytes(range(256)).hex()
    assert one["empty"] == other["empty"] == ""
    files = {path.name for path in Path(before).iterdir()}
    assert sorted([*one["reads"], *other["reads"]]) == sorted(files)  # each by one of them
    assert other["reads"]


if __name__ == "__main__":
    print(json.dumps(gloo_worker(int(sys.argv[1]), Path(sys.argv[2]))))

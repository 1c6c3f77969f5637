"""Blocks of tensors are the files that safetensors writes, bit by bit, and are not copied again."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.storage import object_store
from ddpm_ray.training.tensor_file import DTYPES, file_bytes, packed
from tests.limits import ENDS_S

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Random bits, of which half are not in the order of their memory."""
    width = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel() * width
    bits = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed))
    made = bits.to(torch.uint8).view(dtype).view(shape)
    return made.transpose(0, -1).contiguous().transpose(0, -1) if shape and seed % 2 else made


GROUPS = st.dictionaries(
    NAMES, st.builds(tensor, st.sampled_from(list(DTYPES)), SHAPES, st.integers(0, 99)), max_size=6
)


def whole(group: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in group.items()})


@given(GROUPS)
def test_a_file_has_the_bytes_that_safetensors_writes(group: dict[str, Tensor]) -> None:
    assert bytes(file_bytes(group)) == whole(group)
    assert bytes(file_bytes(packed(group))) == whole(group)


@given(GROUPS, st.data())
def test_a_changed_group_is_not_written_as_it_was_packed(
    group: dict[str, Tensor], data: st.DataObject
) -> None:
    """Views of a block may be renamed, left out or swapped: the file is that of the group."""
    views = packed(group)
    kept = data.draw(st.lists(st.sampled_from(sorted(views)), unique=True)) if views else []
    names = data.draw(st.permutations(kept))
    changed = {name: views[old] for name, old in zip(names, kept, strict=True)}
    assert bytes(file_bytes(changed)) == whole(changed)


def test_a_packed_group_is_written_from_its_own_memory() -> None:
    group = packed({"a": torch.arange(4), "b": torch.zeros(3)})
    written = file_bytes(group)
    group["b"][1] = 5
    assert bytes(written) == whole(group)


def test_a_dtype_that_files_do_not_store_is_named() -> None:
    with pytest.raises(KeyError, match="complex128"):
        file_bytes({"a": torch.zeros(1, dtype=torch.complex128)})


def _longest_hold_s(act: Any) -> float:
    """Most CPU seconds of `act` between two moments at which another thread ran."""
    held: list[float] = [0.0]
    done, measured = threading.Event(), threading.Event()

    def doing() -> None:
        act()
        done.set()
        measured.wait(ENDS_S)  # the clock of a thread that has ended is invalid (EINVAL)

    thread = threading.Thread(target=doing)
    thread.start()
    assert thread.ident is not None
    clock, before = time.pthread_getcpuclockid(thread.ident), 0.0
    while not done.wait(0.001):
        now = time.clock_gettime(clock)
        held.append(now - before)
        before = now
    held.append(time.clock_gettime(clock) - before)
    measured.set()
    thread.join()
    return max(held)


def test_other_threads_run_while_a_large_group_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats need the interpreter's lock, which safetensors.save holds for all of its copy.

    In the best of some rounds, as a busy machine can keep the other thread from running as well.
    """
    monkeypatch.setattr(os, "fsync", lambda file: None)
    group = {str(i): torch.ones(1, 2**20) for i in range(32)}

    def save() -> None:
        object_store.write_bytes(str(tmp_path / "file"), file_bytes(packed(group)))

    whole_s = min(_longest_hold_s(lambda: safetensors.torch.save(group)) for _ in range(3))
    assert min(_longest_hold_s(save) for _ in range(5)) < whole_s / 2

"""One checkpoint's folder is read without the store that committed it."""

from pathlib import Path

import pytest
import torch

from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from tests.training.test_checkpoints import assert_same_bits, snapshot


def test_to_sample_the_average_alone_is_read(tmp_path: Path) -> None:
    where = CheckpointStore(str(tmp_path)).save(snapshot(3))
    for name in ("model.safetensors", "optimizer.safetensors"):
        Path(where, name).unlink()
    found = checkpoint_folder.read_checkpoint(where, groups=("ema",))
    assert list(found.tensors) == ["ema"]
    assert torch.equal(found.tensors["ema"]["w"], snapshot(3).tensors["ema"]["w"])


def test_a_folder_without_pointer_vouches_for_itself(tmp_path: Path) -> None:
    """A person may copy one checkpoint elsewhere; a damaged one is still refused."""
    where = Path(CheckpointStore(str(tmp_path / "run")).save(snapshot(5)))
    copy = tmp_path / "copy"
    where.rename(copy)
    assert_same_bits(checkpoint_folder.read_checkpoint(str(copy)), snapshot(5))
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be understood"):
        checkpoint_folder.read_checkpoint(str(copy))

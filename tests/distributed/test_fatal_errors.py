"""An error that would recur ends the run; a lost peer, device or storage does not."""

import errno
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
import torch
import torch.distributed as dist
from torch import nn

from ddpm_ray import fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.distributed import fatal_errors
from ddpm_ray.runs import train_worker
from ddpm_ray.runs.evaluation import ema_search, evaluate_worker
from ddpm_ray.storage.errors import StorageError, storage_error
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.divergence_guard import DivergedError
from ddpm_ray.training.writer_lease import LeaseLostError, SupersededError

ROOT = Path(__file__).parents[2]


def raised(act: Callable[[], Any]) -> Exception:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whichever it is
        return error
    raise AssertionError("nothing was raised")


MISTAKES: dict[str, Callable[[], Any]] = {  # as torch and Python themselves raise them
    "shapes": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "dtypes": lambda: nn.Linear(2, 2)(torch.ones(1, 2, dtype=torch.float64)),
    "devices": lambda: torch.ones(2, device="meta") + nn.Embedding(3, 2)(torch.ones(1).long()),
    "float bits": lambda: torch.ones(2) ^ 1,
    "empty stack": lambda: torch.stack([]),
    "state": lambda: nn.Linear(2, 2).load_state_dict({}),
    "no backend": lambda: torch.ones(2, device="cuda"),
    "index": lambda: nn.Embedding(3, 2)(torch.tensor([7])),
    "attribute": lambda: (None).step,  # type: ignore[attr-defined]
    "type": lambda: len(3),  # type: ignore[arg-type]
    "key": lambda: dict[str, int]()["step"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_program_comes_again(name: str) -> None:
    assert not fatal_errors.is_transient(raised(MISTAKES[name]))


@pytest.mark.parametrize(
    "text",
    [
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and"
        " cpu!",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the"
        " same",
        "CUDA error: device-side assert triggered",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`",
    ],
)
def test_a_mistake_on_a_gpu_comes_again(text: str) -> None:
    assert not fatal_errors.is_transient(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2395, unhandled system error"),
        dist.DistNetworkError("Connection reset by peer"),
        dist.DistStoreError("wait timeout after 300000ms"),
        ray.exceptions.ActorDiedError(),
        ConnectionResetError(104, "Connection reset by peer"),
        StorageError("s3://bucket/a", "no answer in 180 s", "check the endpoint"),
        fault_injection.InjectedFaultError("injected fault at batch, step 3"),
        SupersededError("s3://bucket/run", 8),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_what_passes_has_the_workers_started_again(error: Exception) -> None:
    assert fatal_errors.is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        DivergedError(3, 1.0, 0.5, ["a"]),
        LeaseLostError("s3://bucket/run", 8),
        CheckpointError("s3://bucket/run", "no checkpoint verifies (timed out)", "restore one"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        ValueError("the images are 4 x 5"),
        storage_error("/runs/a", OSError(errno.ENOSPC, "No space left on device"), True),
        storage_error("/runs/a", OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        storage_error("/runs/a", OSError(errno.EROFS, "Read-only file system"), True),
        storage_error("/runs/a", PermissionError("not yours"), True),
        storage_error("/runs/a", IsADirectoryError("a"), True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_our_own_errors_end_the_run_in_their_own_words(error: Exception) -> None:
    assert not fatal_errors.is_transient(error)
    assert fatal_errors.fatal_reason(error) == (str(error) or "MemoryError")


def test_an_error_of_the_program_is_reported_with_its_class_and_place() -> None:
    error = raised(lambda: Workers().share(None))  # type: ignore[arg-type]
    assert fatal_errors.fatal_reason(error).startswith("TypeError: unsupported operand type(s)")
    assert "ddpm_ray/collectives.py:" in fatal_errors.fatal_reason(error)


@pytest.mark.parametrize(
    "work, part",
    [
        (train_worker.train_worker, "train_worker._train"),
        (evaluate_worker.evaluate_worker, "evaluation.evaluate_worker._scores"),
        (ema_search.ema_search_worker, "evaluation.ema_search.score_widths"),
    ],
)
@pytest.mark.parametrize(
    "error, reported",
    [
        (TypeError("3 is no step"), ["TypeError: 3 is no step"]),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), []),
    ],
)
def test_workers_report_what_ends_the_run(
    work: Callable[[dict[str, Any]], Any],
    part: str,
    error: Exception,
    reported: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(f"ddpm_ray.runs.{part}", fails)
    monkeypatch.setattr(ema_search, "distributed_context", Workers)
    reasons: list[str] = []
    control = SimpleNamespace(
        status=lambda: SimpleNamespace(fatal=None), report=None, report_fatal=reasons.append
    )
    settings = {"control": control, "config": {}, "run": "", "step": 0}
    with pytest.raises(type(error), match=r"no step|closed by peer"):
        work(settings)
    assert [reason.partition(" (")[0] for reason in reasons] == reported


@pytest.mark.slow  # nine processes import torch's compiler, as DDP does
@pytest.mark.timeout(360)
def test_the_loss_of_a_peer_passes(tmp_path: Path) -> None:
    """What gloo really raises, in each kind of exchange."""
    command = [sys.executable, "-m", "tests.distributed.lost_peer", str(tmp_path / "meet")]
    reported = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    ).stdout
    errors = {
        exchange: pickle.loads(bytes.fromhex(pickled))
        for exchange, pickled in map(str.split, reported.splitlines())
    }
    assert sorted(errors) == ["gather", "gradient", "pairs", "sum"]
    assert all(fatal_errors.is_transient(error) for error in errors.values()), errors

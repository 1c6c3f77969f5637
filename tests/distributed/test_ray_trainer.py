"""What Ray Train's trainer is given: environment of the workers, policies."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import create_failure_policy

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed import failures, ray_trainer
from ddpm_ray.training import determinism


def test_a_worker_starts_with_the_variables_that_make_its_bits_repeat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA and NCCL read them once, before any of our code could set them."""
    made: list[dict[str, str]] = []

    def trainer(*_: Any, run_config: Any, **__: Any) -> SimpleNamespace:
        made.append(run_config.worker_runtime_env["env_vars"])
        return SimpleNamespace()

    monkeypatch.setattr(ray_trainer, "GroupTrainer", trainer)
    for deterministic in (False, True):
        settings = {"environment": determinism.environment(deterministic), "control": None}
        ray_trainer.build_trainer(lambda _: None, settings, ClusterConfig(), [1], str(tmp_path))
    assert "CUBLAS_WORKSPACE_CONFIG" not in made[0]
    assert made[1] == made[0] | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def test_ray_is_given_the_policy_that_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "ray.train.torch.TorchTrainer._initialize_and_run_controller",
        lambda self, **settings: given.update(settings),
    )
    trainer = ray_trainer.GroupTrainer.__new__(ray_trainer.GroupTrainer)
    trainer.control = SimpleNamespace()  # type: ignore[assignment]
    policy = create_failure_policy(FailureConfig(max_failures=3))
    trainer._initialize_and_run_controller(failure_policy=policy, scaling_policy="Ray's own")
    assert isinstance(given["failure_policy"], failures.ReportedFailures)
    assert given["failure_policy"].failure_config.max_failures == 3
    assert given["scaling_policy"] == "Ray's own"

"""Features are computed in float32 whatever the process is set to; deterministic is set whole."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet, float32_backends, in_float32
from ddpm_ray.tracking import model_registry
from tests.limits import ENDS_S

BACKENDS = float32_backends()


def flags() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "fp32_precision", "tf32")


@pytest.mark.usefixtures("_tf32")
def test_neither_tf32_nor_autocast_reaches_a_feature_network() -> None:
    seen: list[tuple[list[str], torch.dtype]] = []

    def features_of(images: Tensor) -> Tensor:
        product = torch.ones(2, 2) @ torch.ones(2, 2)  # bf16 under autocast
        seen.append((flags(), product.dtype))
        return product

    net = FeatureNet(
        "digits", (2,), lambda images: {2: features_of(images)}, {}, lambda f: features_of(f[2])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(torch.zeros(2, 8, 8, 1, dtype=torch.uint8))[2].dtype == torch.float32
        probability = net.probabilities({2: torch.ones(2, 2)})
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [(["ieee"] * 3, torch.float32)] * 2
    assert probability is not None
    assert probability.tolist() == [[0.5, 0.5]] * 2
    assert flags() == ["tf32"] * 3


@pytest.mark.usefixtures("_tf32")
def test_the_flags_are_put_back_where_a_network_fails() -> None:
    def fail(images: Tensor) -> dict[int, Tensor]:
        raise ValueError("no such network")

    with pytest.raises(ValueError, match="no such network"):
        FeatureNet("digits", (2,), fail, {})(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    assert flags() == ["tf32"] * 3


@pytest.mark.usefixtures("_tf32")
def test_the_flags_are_put_back_though_two_threads_look_at_images() -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with in_float32("cpu"):
            first_in.set()
            second_in.wait(1)  # it waits outside, so that this passes by; were it let in, it is
        first_out.set()

    def second() -> None:
        assert first_in.wait(ENDS_S)
        with in_float32("cpu"):
            second_in.set()
            assert first_out.wait(ENDS_S)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(60)
    assert flags() == ["tf32"] * 3


def test_the_provenance_says_on_what_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = sample_quality.arithmetic(torch.device("cpu"))
    assert reported == {
        "device": "cpu",
        "samples_tf32": False,
        "features": "float32 without TF32",
        "deterministic": False,
    }
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    reported = sample_quality.arithmetic(torch.device("cuda:1"))
    assert (reported["device"], reported["samples_tf32"]) == (
        "NVIDIA H100",
        True,
    )  # cuDNN's default


def test_scores_of_earlier_versions_still_compare() -> None:
    """A champion from before the provenance recorded devices."""
    before = {"samples": {"seed": 1}, "features": {"network": "inception"}}
    now = before | {"arithmetic": sample_quality.arithmetic(torch.device("cpu"))}
    assert model_registry._protocol(now) == model_registry._protocol(before)
    assert model_registry._protocol(now) != model_registry._protocol(
        now | {"features": {"network": "digits"}}
    )


def test_deterministic_algorithms_are_those_of_torch_and_cudnn() -> None:
    program = """
import torch
from ddpm_ray.training import determinism
determinism.configure()
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
      torch.backends.cudnn.benchmark)
"""
    reported = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=ENDS_S,
    ).stdout
    assert reported.split() == ["True", "True", "False"]

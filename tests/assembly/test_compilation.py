"""torch.compile: its modes, former values, and machines without a compiler."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_ray.assembly import compilation
from ddpm_ray.assembly.compilation import NoCompilerError
from ddpm_ray.config.loading import from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KEYS = ["name=a", "data.url=d"]


@pytest.mark.parametrize(
    "given, mode",
    [
        ("true", "default"),
        ("false", "off"),
        ("True", "default"),
        ("off", "off"),
        ("on", "default"),
        ("default", "default"),
        ("reduce-overhead", "reduce-overhead"),
        ("max-autotune", "max-autotune"),
    ],
)
def test_booleans_of_earlier_versions_are_modes(given: str, mode: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"training:\n  compile: {given}\n")
    for config in (
        load_config(RunConfig, None, [*KEYS, f"training.compile={given}"]),
        load_config(RunConfig, str(file), KEYS),
    ):
        assert config.training.compile == mode
        assert from_dict(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize("saved, mode", [(True, "default"), (False, "off")])
def test_a_saved_config_of_an_earlier_version_is_read(saved: bool, mode: str) -> None:
    stored: dict[str, Any] = to_dict(load_config(RunConfig, None, KEYS))
    stored["training"]["compile"] = saved
    del stored["training"]["compile_fallback"]
    assert from_dict(RunConfig, stored).training.compile == mode


def test_off_is_the_network_itself_and_modes_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = nn.Linear(1, 1), []
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda of, mode: seen.append((of, mode)))
    assert compilation.compiled(network, "off", CPU, "training", False) is network
    compilation.compiled(network, "default", CPU, "training", False)
    compilation.compiled(network, "reduce-overhead", CPU, "training", True)
    assert seen == [(network, "default"), (network, "reduce-overhead")]


NONE_FOUND = {
    "cpu": "training.compile is default, and this worker has no C++ compiler (g++, or the one "
    "named in CXX): install it, or set training.compile=off or training.compile_fallback=true",
    "cuda": "training.compile is default, and this worker has no triton: install it, or set "
    "training.compile=off or training.compile_fallback=true",
}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_without_a_compiler_one_line_says_so_or_it_trains_without_if_asked(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    network = nn.Linear(1, 1)
    with pytest.raises(NoCompilerError, match=re.escape(NONE_FOUND[device.type]) + "$"):
        compilation.compiled(network, "default", device, "training", False)
    with caplog.at_level(logging.WARNING):
        assert compilation.compiled(network, "default", device, "training", True) is network
    assert "not compiled (training.compile_fallback)" in caplog.text


def test_the_named_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in compilation.missing_compiler(CPU)
    monkeypatch.setenv("CXX", "sh")
    assert not compilation.missing_compiler(CPU)

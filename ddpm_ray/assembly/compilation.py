"""torch.compile in the configured mode, and bfloat16, where a worker has them."""

import importlib.util
import logging
import os
import shutil

import torch
from torch import nn

from ddpm_ray.config.training import CompileMode

log = logging.getLogger(__name__)


class NoCompilerError(RuntimeError):
    """A network that shall be compiled on a machine without a compiler; args are the message."""


def compiled(
    network: nn.Module, mode: CompileMode, device: torch.device, group: str, fallback: bool
) -> nn.Module:
    """`network`, compiled at its first call in `mode`; it keeps its parameters.

    Without a compiler for `device`: `network` itself, with a warning, if `fallback`, else raises
    NoCompilerError. `group` is that of the options compile and compile_fallback, for messages.
    """
    if mode == "off":
        return network
    if missing := missing_compiler(device):
        said = f"{group}.compile is {mode}, and this worker has no {missing}"
        if not fallback:
            raise NoCompilerError(
                f"{said}: install it, or set {group}.compile=off or {group}.compile_fallback=true"
            )
        log.warning("%s: not compiled (%s.compile_fallback)", said, group)
        return network
    result: nn.Module = torch.compile(network, mode=mode)  # type: ignore[assignment]
    return result


def uses_cuda_graphs(mode: CompileMode) -> bool:
    """Whether `mode` replays CUDA graphs: each call reuses the memory of the last one's results."""
    return mode in ("reduce-overhead", "max-autotune")


def missing_compiler(device: torch.device) -> str:
    """The part of torch.compile for `device` that this machine lacks; empty if it has all."""
    if device.type == "cpu":  # C++ code, as torch looks for its compiler
        name = os.environ.get("CXX") or "g++"
        return "" if shutil.which(name) else f"C++ compiler ({name}, or the one named in CXX)"
    if importlib.util.find_spec("triton") is None:
        return "triton"
    named = os.environ.get("CC")  # triton compiles the code that launches its kernels
    if any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        return ""
    return f"C compiler ({named or 'gcc or clang'}, or the one named in CC)"


def require_bf16(device: torch.device, key: str) -> None:
    """Raise ValueError if `device` does not compute in bfloat16; `key`: the option that asks."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{key} is bf16_weights, and {name} has no bfloat16: set {key}=fp32")

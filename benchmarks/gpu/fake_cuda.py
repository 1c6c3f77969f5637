"""CUDA tensors in a build of torch without CUDA: their device is fake, their values are real.

A tensor says that it lies on cuda:0 and holds its values in a tensor on the CPU, where each
operation is done. Code under test therefore takes the branches that its values ask for, runs its
backward passes and writes its checkpoints; what CUDA would refuse is refused, in CUDA's words:

- operands on two devices, but for a number (a CPU tensor of no dimensions) in a pointwise operation
- a group norm of operands of two types, which the CPU takes
- what has no deterministic kernel, where torch is asked for deterministic algorithms
- `.numpy()` of what was not copied to the host

Each operation for which a GPU makes the host wait, or the host a GPU, is noted with its place in
ddpm_ray; a copy to the device also where its memory is pinned and nobody waits. Speed, memory and
rounding are the CPU's, and kernels that CUDA lacks pass unnoticed.
"""

import contextlib
import functools
import itertools
import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
MOVES = {"aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"}
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}
TAKES_NUMBERS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_", *INDEXING}
ONE_TYPE = {"aten::native_group_norm"}  # of all floating operands, on CUDA alone
NOT_DETERMINISTIC = {  # on CUDA (torch.use_deterministic_algorithms); what of it takes our shapes
    "aten::_adaptive_avg_pool2d_backward",
    "aten::adaptive_max_pool2d_backward",
    "aten::avg_pool3d_backward",
    "aten::grid_sampler_2d_backward",
    "aten::histc",
    "aten::kthvalue",
    "aten::median.dim",
    "aten::nanmedian.dim",
    "aten::nll_loss2d_forward",
    "aten::put_",
    "aten::reflection_pad2d_backward",
    "aten::replication_pad2d_backward",
    "aten::upsample_bicubic2d_backward",
    "aten::upsample_bilinear2d_backward",
}


@dataclass(frozen=True, order=True)
class Sync:
    """A place where host and device wait for each other; the same after edits that move lines."""

    kind: str
    module: str  # below ddpm_ray/; "" where torch itself calls back, as in a backward pass
    function: str
    expression: str  # what is evaluated there


def _expression(frame: FrameType) -> str:
    """The source of what `frame` is evaluating, on one line; empty where that is not known."""
    positions = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    first, last, begin, end = next(positions)
    if first is None or last is None or begin is None or end is None:
        return ""
    name = frame.f_code.co_filename
    lines = [linecache.getline(name, number).encode() for number in range(first, last + 1)]
    lines[-1] = lines[-1][:end]  # offsets are of bytes, and the last line may be the first
    lines[0] = lines[0][begin:]
    return " ".join(line.decode().strip() for line in lines)


class Syncs:
    """Counts of what was noted since the last `clear`."""

    def __init__(self) -> None:
        self.counts: Counter[Sync] = Counter()

    def note(self, kind: str) -> None:
        """Count one at the innermost place in ddpm_ray that is being executed."""
        frame = sys._getframe(1)
        while frame is not None:
            _, found, module = frame.f_code.co_filename.rpartition("/ddpm_ray/")
            if found and Path(frame.f_code.co_filename).suffix == ".py":
                self.counts[Sync(kind, module, frame.f_code.co_qualname, _expression(frame))] += 1
                return
            frame = frame.f_back  # type: ignore[assignment]  # None above the first
        self.counts[Sync(kind, "", "", "")] += 1

    def clear(self) -> None:
        """Forget all."""
        self.counts.clear()


SYNCS = Syncs()


class FakeCudaTensor(Tensor):
    """A tensor that claims to be on cuda:0; `host` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "FakeCudaTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Allow a module to move its parameters here, together with its inverse."""
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "FakeCudaTensor":
        return FakeCudaTensor(inner["host"])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FakeCudaTensor({self.host!r})"

    def tolist(self) -> Any:
        """Copy through the host, as torch does, which refuses subclasses."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raises what CUDA tensors raise."""
        if force:
            return self.cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub forgets the operation
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _executed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes tensors on cuda:0 that no operand asks for: zeros, arange, and copies of the CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _executed(func, args, kwargs or {})


class NoEvent:
    """An event that has always happened: operations end before they return."""

    def record(self, stream: "NoStream") -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class NoStream:
    """A stream of operations that end before they return."""

    def __init__(self, device: torch.device | None = None) -> None: ...

    def wait_event(self, event: NoEvent) -> None:
        """Do nothing."""

    def wait_stream(self, stream: "NoStream") -> None:
        """Do nothing."""


def end_process() -> NoReturn:
    """End this process with status 0, without Python's own clean-up.

    Autograd keeps a thread for each device. One that still drops its last tensors while Python
    cleans up is ended inside C++ code, which aborts the process (1 of 36 on a loaded machine).
    """
    sys.stdout.flush()
    os._exit(0)


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """The device, on which tensors can be made inside; needs fake_library's environment."""
    lifted = torch._C._only_lift_cpu_tensors()
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: "fake",
        "Stream": NoStream,
        "Event": NoEvent,
        "stream": contextlib.nullcontext,
        "current_stream": NoStream,
    }
    before = {name: getattr(torch.cuda, name) for name in replaced}
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") by a copy
    try:
        with _Factories():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        for name, value in before.items():
            setattr(torch.cuda, name, value)


def _executed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation, done by the CPU and refused where CUDA refuses it."""
    operation = _operation(func)
    if operation.is_made_of_others:  # in inference mode these arrive whole
        with _Factories():
            return func.decompose(*args, **kwargs)
    tensors: list[Tensor] = []
    host_args = _mapped(_on_host(tensors), args)
    host_kwargs = {key: _mapped(_on_host(tensors), value) for key, value in kwargs.items()}
    wanted = kwargs.get("device")
    is_fake = [isinstance(tensor, FakeCudaTensor) for tensor in tensors]
    on_cuda = any(is_fake) if wanted is None else torch.device(wanted).type == "cuda"
    if not on_cuda and not any(is_fake):
        return func(*args, **kwargs | ({"pin_memory": False} if "pin_memory" in kwargs else {}))
    _refuse(operation, tensors, is_fake)
    _note(operation, tensors, is_fake, on_cuda)
    if wanted is not None:
        host_kwargs["device"] = torch.device("cpu")
    result = func(*host_args, **host_kwargs)
    if operation.changes_shape:  # of the operand itself, as squeeze_ does
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    if operation.writes:
        return _outputs(operation, args, kwargs, result)
    return _mapped(_on_cuda, result) if on_cuda else result


@dataclass(frozen=True)
class _Operation:
    """Facts about one operation; `writes` are the operands, by place and name, of its results."""

    name: str
    is_made_of_others: bool
    takes_numbers: bool  # of the CPU, beside tensors of the device
    gives_value: bool
    gives_size: bool
    changes_shape: bool
    overload: str
    writes: tuple[tuple[int, str], ...]

    def is_deterministic(self, tensors: list[Tensor]) -> bool:
        """Whether CUDA has a deterministic kernel for these operands."""
        if self.name == "aten::cumsum":
            return not tensors[0].is_floating_point()
        if self.name == "aten::bincount":
            return len(tensors) == 1  # without weights
        return not {self.name, f"{self.name}.{self.overload}"} & NOT_DETERMINISTIC


@functools.cache
def _operation(func: Any) -> _Operation:
    name, tags = func._schema.name, func.tags
    return _Operation(
        name=name,
        is_made_of_others=func._can_decompose(),
        takes_numbers=(
            torch.Tag.pointwise in tags or name in TAKES_NUMBERS or "::_foreach_" in name
        ),
        gives_value=torch.Tag.data_dependent_output in tags,
        gives_size=torch.Tag.dynamic_output_shape in tags and name not in INDEXING,
        changes_shape=torch.Tag.inplace_view in tags,
        overload=func._overloadname,
        writes=tuple(
            (place, argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
    )


def _refuse(operation: _Operation, tensors: list[Tensor], is_fake: list[bool]) -> None:
    """Raises RuntimeError for what CUDA does not do."""
    name = operation.name
    if name in ONE_TYPE and len({t.dtype for t in tensors if t.is_floating_point()}) > 1:
        raise RuntimeError(f"{name}: expected operands of one type on CUDA")
    if torch.are_deterministic_algorithms_enabled() and not operation.is_deterministic(tensors):
        raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA")
    if all(is_fake) or not any(is_fake) or name in MOVES:
        return
    plain = [tensor for tensor, fake in zip(tensors, is_fake, strict=True) if not fake]
    if operation.takes_numbers and all(tensor.ndim == 0 for tensor in plain):
        return
    if name in INDEXING and is_fake[0]:
        return  # places on the host, which CUDA copies first
    raise RuntimeError(
        f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
        "cuda:0 and cpu!"
    )


def _note(operation: _Operation, tensors: list[Tensor], is_fake: list[bool], on_cuda: bool) -> None:
    """Keep it where host and device wait for each other."""
    name = operation.name
    if name in MOVES:
        to_cuda = on_cuda if name == "aten::_to_copy" else is_fake[0]
        if to_cuda and not all(is_fake):
            SYNCS.note("copy to the device")
        elif not to_cuda:
            SYNCS.note("copy to the host")
    elif operation.gives_value:
        SYNCS.note("value to the host")
    elif operation.gives_size:
        SYNCS.note("size to the host")
    elif name in INDEXING:
        if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
            SYNCS.note("size to the host")
        if any(tensor.ndim for tensor, fake in zip(tensors, is_fake, strict=True) if not fake):
            SYNCS.note("copy to the device")


def _outputs(
    operation: _Operation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """The operands that were written to, which are the result."""
    written = [
        args[place] if place < len(args) else kwargs[name]
        for place, name in operation.writes
        if place < len(args) or name in kwargs
    ]
    for tensor in written:
        if isinstance(tensor, FakeCudaTensor) and tensor.shape != tensor.host.shape:
            raise NotImplementedError(f"{operation.name} resizes an operand")
    if result is None:
        return None
    return written[0] if len(written) == 1 else tuple(written)


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `change` of each tensor in it; operands hold them in lists and tuples alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, one) for one in value])
    return value


def _on_host(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Gives the values, and notes in `seen` whose they are."""

    def change(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.host if isinstance(tensor, FakeCudaTensor) else tensor

    return change


def _on_cuda(host: Tensor) -> FakeCudaTensor:
    """A view of a tensor that autograd knows is no inference tensor in inference mode either."""
    if host.is_inference() or not torch.is_inference_mode_enabled():
        return FakeCudaTensor(host)
    with torch.inference_mode(False):
        return FakeCudaTensor(host)

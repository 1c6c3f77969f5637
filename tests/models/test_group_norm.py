"""Group norm in bfloat16: float32 statistics, what it saves, and its gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.models import group_norm
from ddpm_ray.models.group_norm import GroupNorm, GroupNormSiLU

KINDS = (GroupNorm, GroupNormSiLU)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def built(kind: type[GroupNorm], offset: float = 0.0) -> tuple[GroupNorm, Tensor]:
    """A norm with random weights, and a bfloat16 input with mean `offset`."""
    torch.manual_seed(0)
    norm = kind(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, (torch.randn(3, 16, 6, 5) + offset).bfloat16()


def reference(norm: GroupNorm, x: Tensor) -> Tensor:
    """The same in float64 by its definition, without torch's group norm."""
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    deviation = (groups.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    normalised = ((groups - mean) / deviation).reshape(x.shape)
    weight, bias = (value.double().reshape(1, -1, 1, 1) for value in (norm.weight, norm.bias))
    y = normalised * weight + bias
    return y * y.sigmoid() if isinstance(norm, GroupNormSiLU) else y


@pytest.fixture(params=["cpu", "cpu, large images", "other devices"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's kernels, and those of other devices, on the CPU."""
    if request.param == "other devices":
        monkeypatch.setattr(group_norm, "MIXED_DTYPES", ())
    if request.param == "cpu, large images":
        monkeypatch.setattr(group_norm, "FAST_NHWC_PIXELS", 0)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_statistics_are_float32_and_the_result_bfloat16(
    kernels: str, kind: type[GroupNorm], layout: torch.memory_format, offset: float
) -> None:
    """Statistics in bfloat16 would move the mean of 30 by up to 0.06, a multiple of the bound."""
    norm, x = built(kind, offset)
    y = norm(x.contiguous(memory_format=layout))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=layout)
    wanted = reference(norm, x)
    bound = 0.008 * wanted.abs() + 0.008  # twice the spacing of bfloat16, before and after SiLU
    assert ((y.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_float64(
    kernels: str, kind: type[GroupNorm], layout: torch.memory_format
) -> None:
    norm, x = built(kind)
    x = x.contiguous(memory_format=layout)
    along = torch.randn_like(x)
    found = torch.autograd.grad(
        norm(x.requires_grad_()), [x, norm.weight, norm.bias], grad_outputs=along
    )
    wanted = torch.autograd.grad(
        reference(norm, x), [x, norm.weight, norm.bias], grad_outputs=along.double()
    )
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, exact in zip(found, wanted, strict=True):
        assert (ours.double() - exact.double()).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_input_is_saved(kernels: str, kind: type[GroupNorm]) -> None:
    norm, x = built(kind)
    saved = storages(lambda: norm(x.requires_grad_()))
    assert saved.pop(x.data_ptr()) == 2 * x.numel()
    assert sum(saved.values()) <= 4 * (2 * 16 + 2 * 3 * 4)  # weights and statistics


def storages(action: Callable[[], object]) -> dict[int, int]:
    """Bytes of each tensor that autograd saves in `action`, by address."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_float64_and_autocast_have_the_bits_of_torch(dtype: torch.dtype) -> None:
    norm, x = built(GroupNormSiLU)

    def of_torch(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 4, norm.weight, norm.bias))

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), of_torch(x))
    norm, x = norm.to(dtype), x.to(dtype)
    assert torch.equal(norm(x), of_torch(x))


def test_it_compiles_without_a_break_to_the_same_numbers() -> None:
    norm, x = built(GroupNormSiLU)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, norm(x), atol=0.02, rtol=0.01)

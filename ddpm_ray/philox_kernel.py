"""Philox4x32-10 as one Triton kernel, for GPUs: the words are those of counter_rng.philox.

Nothing but words is computed here. Triton's logarithm and cosine are not those of torch, and a run
draws the same normals with and without this kernel.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

_MOST = 1024  # blocks of an image in one program


def words(
    index: Tensor, step: int | Tensor, purpose: int, seed: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words int64 [*index.shape, blocks] of each block 0..blocks-1 of each index.

    `index` is int64 on the GPU; `step` as `counter_rng.Step`; the seed is taken modulo 2^64.
    """
    result = index.new_empty(4, *index.shape, blocks)
    size = min(_MOST, triton.next_power_of_2(blocks))
    with torch.cuda.device_of(index):  # type: ignore[no-untyped-call]
        _kernel[(index.numel(), triton.cdiv(blocks, size))](
            result,
            index.contiguous(),
            step if isinstance(step, Tensor) else _signed(step),
            purpose,
            _signed(seed),
            _signed(seed >> 32),
            blocks,
            isinstance(step, Tensor),
            size,
        )
    return result[0], result[1], result[2], result[3]


def _signed(value: int) -> int:
    """The low 32 bits as an int32: Triton compiles anew for an argument of another type."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["step", "purpose", "key_0", "key_1", "blocks"]
)
def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    result,
    index,
    step,
    purpose,
    key_0,
    key_1,
    blocks,
    on_device: tl.constexpr,
    size: tl.constexpr,
):
    """Write the four words of up to `size` blocks of one index."""
    # A kernel cannot take objects: these are the fields of a counter, of a key and of two tensors.
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * size + tl.arange(0, size)
    if on_device:
        step = tl.load(step)
    zero = tl.zeros([size], tl.uint32)
    c_0 = block.to(tl.uint32)
    c_1 = zero + tl.load(index + row).to(tl.uint32)
    c_2 = zero + step.to(tl.uint32)
    c_3 = zero + purpose.to(tl.uint32)
    r_0, r_1, r_2, r_3 = tl.philox_impl(
        c_0, c_1, c_2, c_3, key_0.to(tl.uint32), key_1.to(tl.uint32)
    )
    place, inside = result + row * blocks + block, block < blocks
    stride = tl.num_programs(0).to(tl.int64) * blocks  # of `result`
    tl.store(place, r_0.to(tl.int64), mask=inside)
    tl.store(place + stride, r_1.to(tl.int64), mask=inside)
    tl.store(place + 2 * stride, r_2.to(tl.int64), mask=inside)
    tl.store(place + 3 * stride, r_3.to(tl.int64), mask=inside)

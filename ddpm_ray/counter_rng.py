"""Counter-based random numbers: a pure function of (seed, purpose, step, index), without state.

Any worker, after any restart, in a batch of any size, draws the same numbers for the same image.
The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
ten rounds of multiply and mix turn a counter of four 32-bit words into four random words, under a
64-bit key.

The integers are the same on every device; on a GPU with Triton, one kernel computes them. Normals
use torch's logarithm, cosine and square root on their device, so they may differ in the last bits
between kinds of devices, and from those of a compiled function.
"""

import logging
import math
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import TypeAlias, cast

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_WORD = 0xFFFFFFFF  # the low 32 bits

Step: TypeAlias = int | Tensor
"""Number of a training step, in 0..2^32-1; or an int64 tensor [] with it on the device of the draw,
which a compiled function or a CUDA graph reads anew at each call. The numbers drawn are equal."""

Word: TypeAlias = int | Tensor
"""32-bit words: one of the host, or int64 tensors, which broadcast."""

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """Purpose of a draw. The numbers determine what a seed draws: append, never renumber."""

    TIMESTEP = 0
    NOISE = 1
    FLIP = 2
    SAMPLE_START = 3
    SAMPLE_STEP = 4
    DROPOUT = 5
    VALIDATION = 6
    BOUND = 7
    LABEL_DROP = 8
    OFFSET_NOISE = 9
    PERTURBATION = 10
    SELF_CONDITIONING = 11
    LOW_RESOLUTION = 12
    LIKELIHOOD = 13
    POSTERIOR = 14
    RECONSTRUCTION = 15
    INPAINTING_MASK = 16
    CAPTION = 17
    PROMPT = 18
    EMBEDDING_DROP = 19
    CASCADE = 20
    CROP_ROW = 21
    CROP_COLUMN = 22
    BLUR = 23


def normal(
    seed: int,
    purpose: Purpose,
    step: Step,
    index: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals float32 [B, *shape] on `device` (index's own by default).

    Row i belongs to image (or batch position) index[i], int64 [B] in 0..2^32-1, and is the same
    whatever else is in the call; the seed is taken modulo 2^64. All are within 6.8 of 0, which 1
    normal in 10^11 would not be. Raises ValueError for another step or index, as all draws do:
    modulo 2^32 it would repeat another image's numbers. Values on a GPU are not checked.
    """
    index = index.to(device or index.device)
    size, count = math.prod(shape), len(index)
    blocks = -(-size // 4)
    words = _words(seed, purpose, step, index, blocks)

    # Box-Muller: a word for the radius and one for the angle give two normals. float32 suffices and
    # is 2 x faster than float64 here: near 0 a float32 uniform is as fine as its word, and it is
    # there that the logarithm makes the tail. Half a unit added keeps it from being 0.
    radius = torch.empty(count, 2, blocks, dtype=torch.float32, device=index.device)
    angle = torch.empty_like(radius)
    radius[:, 0], radius[:, 1], angle[:, 0], angle[:, 1] = words
    radius.add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle.mul_(2 * math.pi * 2**-32)
    normals = torch.stack((angle.cos(), angle.sin_()), 1).mul_(radius[:, None])
    return normals.view(count, 4 * blocks)[:, :size].reshape(count, *shape)


def uniform_float(
    seed: int, purpose: Purpose, step: Step, index: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Uniform float32 [B, *shape] in [0, 1), multiples of 2^-24; rows belong to index as above."""
    size = math.prod(shape)
    words = torch.stack(_words(seed, purpose, step, index, -(-size // 4)), 2)  # [B, blocks, 4]
    return (words.flatten(1)[:, :size] >> 8).float().mul_(2**-24).view(len(index), *shape)


def uniform_int(seed: int, purpose: Purpose, step: Step, index: Tensor, high: Word) -> Tensor:
    """Integers int64 in 0..high-1, one for each entry of `index` and of its shape; high <= 2^31.

    `high` may be an int64 tensor of that shape; where it is 0, the integer is 0.

    The high word of a 32-bit word times `high`: no value is likelier than another by more than a
    part in 2^32 / high (4 million for high = 1000).
    """
    word, *_ = _words(seed, purpose, step, index)
    return word * high >> 32


def coin(seed: int, purpose: Purpose, step: Step, index: Tensor) -> Tensor:
    """Fair coins, bool, one for each entry of `index` and of its shape."""
    return uniform_int(seed, purpose, step, index, 2).bool()


def derived_seed(seed: int, purpose: Purpose, step: int, index: int) -> int:
    """A seed in 0..2^64-1 for a generator that is not ours, as torch.manual_seed for dropout.

    Computed on the host in 10 us. Raises ValueError as `normal`.
    """
    _require_word("step", step, step)
    _require_word("index", index, index)
    low, high, *_ = philox((0, index, step, int(purpose)), seed)
    return cast(int, high) << 32 | cast(int, low)


def _words(
    seed: int, purpose: Purpose, step: Step, index: Tensor, blocks: int | None = None
) -> Words:
    """Four words int64 [*index.shape, blocks] of each block of each index.

    Without `blocks`, those of block 0, [*index.shape].
    """
    if torch.compiler.is_compiling():  # its numbers of the host have 64 bits; it has no values
        step = step if isinstance(step, Tensor) else torch.full((), step, device=index.device)
    else:
        if isinstance(step, int):
            _require_word("step", step, step)
        if type(index) is Tensor:  # a fake tensor has no values
            # Indices on a GPU are not checked, because the host would wait for them.
            if index.is_cpu and index.numel():
                _require_word("index", *(int(end) for end in index.aminmax()))
            if kernel := _gpu_words(index.device):
                if blocks is not None:
                    return kernel(index, step, int(purpose), seed, blocks)
                first = kernel(index, step, int(purpose), seed, 1)
                return cast(Words, tuple(word[..., 0] for word in first))
    block: Word = 0
    if blocks is not None:
        block, index = torch.arange(blocks, device=index.device), index[..., None]
    counter = (block, index, step, int(purpose))  # reads from block to purpose
    return cast(Words, philox(counter, seed))  # each depends on the index


@cache
def _gpu_words(device: torch.device) -> Callable[[Tensor, Step, int, int, int], Words] | None:
    """`philox_kernel.words` on a GPU: one kernel for each draw, where torch launches hundreds.

    None on other devices, and with a warning where it cannot run. It is tried once, on words that
    the host knows: only then does the host wait.
    """
    if device.type != "cuda":
        return None
    last, purpose = _WORD, int(Purpose.NOISE)
    try:
        from ddpm_ray.philox_kernel import words  # Triton comes with torch for CUDA alone

        found = words(torch.tensor([last], device=device), last, purpose, 2**64 - 1, 2)
        known = [philox((block, last, last, purpose), 2**64 - 1) for block in range(2)]
        if list(zip(*(word[0].tolist() for word in found), strict=True)) != known:
            raise ArithmeticError("its numbers are wrong")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # without it runs are slower, with the same bits
        log.warning(
            "%s: random numbers take hundreds of kernels more in each step, because the Triton "
            "kernel for them does not run (%s: %s); it needs triton and a C compiler",
            device,
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return None
    return words


def _require_word(name: str, low: int, high: int) -> None:
    """Raises ValueError unless low..high lies in 0..2^32-1."""
    if low < 0 or high > _WORD:
        remedy = ": give each image one of its own" if name == "index" else ""
        raise ValueError(
            f"{name} is {low if low < 0 else high}; random numbers are keyed by "
            f"{'indices' if name == 'index' else 'steps'} of 0..2^32-1{remedy}"
        )


def philox(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Word, Word, Word, Word]:
    """Four 32-bit words for each counter of four; Philox4x32-10 with the seed as key.

    The four parts of the counter broadcast, and the first rounds stay as small as they are. What
    follows from parts of the host alone is computed by the host, without an operation of torch.
    """
    # A product of two words may wrap below 0 in int64 and still holds the right 64 bits. Its low
    # word goes on with the high one above it: xor does not carry, so `_mixed` masks both at once.
    c_0, c_1, c_2, c_3 = counter
    key_0, key_1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        product_0, product_2 = c_0 * 0xD2511F53, c_2 * 0xCD9E8D57
        c_0, c_1 = _mixed(product_2, c_1, key_0), product_2
        c_2, c_3 = _mixed(product_0, c_3, key_1), product_0
        key_0, key_1 = key_0 + 0x9E3779B9 & _WORD, key_1 + 0xBB67AE85 & _WORD
    return c_0, c_1 & _WORD, c_2, c_3 & _WORD


def _mixed(product: Word, word: Word, key: int) -> Word:
    """The product's high word, xor `word`, xor `key`, in 0..2^32-1."""
    high = product >> 32
    if isinstance(high, int):  # the host's part and the key are one number
        return (word ^ (high ^ key)) & _WORD
    if isinstance(word, int):
        return (high ^ (word & _WORD ^ key)) & _WORD
    return (high ^ word).bitwise_xor_(key).bitwise_and_(_WORD)

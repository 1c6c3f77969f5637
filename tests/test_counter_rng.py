"""Philox against its authors' numbers; draws against their laws."""

import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import (
    Purpose,
    Step,
    coin,
    derived_seed,
    normal,
    philox,
    uniform_float,
    uniform_int,
)

KNOWN_ANSWERS = [  # Random123 1.14, kat_vectors, philox4x32 10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORDS_OF_ZERO = KNOWN_ANSWERS[0][2]  # counter 0: block 0, index 0, step 0, purpose TIMESTEP
seeds = st.integers(0, 2**64 - 1)
words = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_its_authors_numbers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    c_0, c_1, c_2, c_3 = (torch.tensor(c) for c in counter)
    found = philox((c_0, c_1, c_2, c_3), key[0] + key[1] * 2**32)
    assert tuple(int(word) for word in found) == answer


@given(seeds, st.lists(words, min_size=3, max_size=3), st.lists(words, min_size=2, max_size=2))
def test_broadcast_counters_are_single_counters(
    seed: int, rows: list[int], columns: list[int]
) -> None:
    two, three = torch.tensor(7), torch.tensor(11)
    table = philox((torch.tensor(columns), torch.tensor(rows)[:, None], two, three), seed)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            alone = philox((torch.tensor(column), torch.tensor(row), two, three), seed)
            there = [int(torch.as_tensor(word)[i, j]) for word in table]
            assert there == [int(word) for word in alone]


def test_what_a_seed_means_follows_from_the_published_words() -> None:
    """Every kind of draw at counter 0 and seed 0, worked out from Random123's words by hand."""
    zero, purpose = torch.tensor([0]), Purpose.TIMESTEP
    r_0, r_1 = (math.sqrt(-2 * math.log((w + 0.5) / 2**32)) for w in WORDS_OF_ZERO[:2])
    a_0, a_1 = (2 * math.pi * w / 2**32 for w in WORDS_OF_ZERO[2:])
    by_hand = [r_0 * math.cos(a_0), r_1 * math.cos(a_1), r_0 * math.sin(a_0), r_1 * math.sin(a_1)]
    assert normal(0, purpose, 0, zero, (4,))[0].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert uniform_int(0, purpose, 0, zero, 1000).tolist() == [399]  # 0x6627e8d5 / 2^32 = 0.39904
    assert coin(0, purpose, 0, zero).tolist() == [False]
    assert derived_seed(0, purpose, 0, 0) == 0xE169C58D6627E8D5


@given(seeds, words, words, st.sampled_from(Purpose))
def test_a_derived_seed_is_two_words_of_the_tensors_generator(
    seed: int, step: int, index: int, purpose: Purpose
) -> None:
    zero, *rest = (torch.tensor(part) for part in (0, index, step, int(purpose)))
    low, high, *_ = philox((zero, rest[0], rest[1], rest[2]), seed)
    assert derived_seed(seed, purpose, step, index) == int(high) * 2**32 + int(low)


def test_a_derived_seed_needs_no_operation_of_torch() -> None:
    with Operations() as counted:
        derived_seed(1, Purpose.DROPOUT, 2, 3)
    assert counted.names == []


class Operations(TorchDispatchMode):
    """The names of torch's operations in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def all_draws(seed: int, step: Step, index: Tensor) -> list[Tensor]:
    return [
        normal(seed, Purpose.NOISE, step, index, (3, 5, 5)),
        uniform_float(seed, Purpose.LIKELIHOOD, step, index, (7,)),
        uniform_int(seed, Purpose.TIMESTEP, step, index, 1000),
        coin(seed, Purpose.FLIP, step, index),
    ]


@given(seeds, words, st.lists(words, min_size=1, max_size=9))
def test_a_step_on_the_device_draws_as_its_number_does(
    seed: int, step: int, images: list[int]
) -> None:
    index = torch.tensor(images)
    of_number, of_tensor = (all_draws(seed, of, index) for of in (step, torch.tensor(step)))
    assert all(map(torch.equal, of_number, of_tensor))


@pytest.mark.parametrize("on_device", [False, True])
def test_compiled_draws_are_one_graph_with_the_same_bits(on_device: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(normal, backend="aot_eager", fullgraph=True)
    seed, index, shape = 2**64 - 59, torch.arange(5) + 3, (3, 5, 5)
    for step in (4, 2**31, 2**32 - 1):  # the second time torch makes the number a variable
        of = torch.tensor(step) if on_device else step
        found = compiled(seed, Purpose.NOISE, of, index, shape)
        assert torch.equal(found, normal(seed, Purpose.NOISE, step, index, shape)), step


VIEWS = {"empty", "empty_like", "select", "slice", "unsqueeze", "view", "expand", "alias"}
CUDA = torch.device("cuda")


class FakeKernel:
    """The kernel as a GPU would run it: one launch, without an operation of torch."""

    def __init__(self) -> None:
        self.launches = 0
        self.known: dict[int, list[Tensor]] = {}

    def __call__(self, index: Tensor, step: Step, purpose: int, seed: int, blocks: int) -> Any:
        self.launches += 1
        if blocks not in self.known:
            block = torch.arange(blocks)
            words = philox((block, index[..., None], step, purpose), seed)
            self.known[blocks] = [torch.as_tensor(word) for word in words]
        return tuple(self.known[blocks])


def test_the_draws_of_a_step_are_few_launches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws() -> None:
        normal(1, Purpose.NOISE, 5, index, (3, 32, 32))
        uniform_int(1, Purpose.TIMESTEP, 5, index, 1000)
        coin(1, Purpose.FLIP, 5, index)

    index, kernel = torch.arange(8, dtype=torch.int64), FakeKernel()
    monkeypatch.setattr(counter_rng, "_gpu_words", lambda device: kernel)
    draws()
    kernel.launches = 0
    with Operations() as counted:
        draws()
    of_the_host = {"aminmax", "_local_scalar_dense"}  # the check of indices on a CPU
    names = [name.partition(".")[0] for name in counted.names]
    assert kernel.launches == 3
    assert len([name for name in names if name not in VIEWS | of_the_host]) + 3 <= 30


@pytest.fixture
def kernel_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands for philox_kernel.py, as if the device of its words were a GPU."""
    module, made = SimpleNamespace(), torch.tensor
    monkeypatch.setitem(sys.modules, "ddpm_ray.philox_kernel", module)
    monkeypatch.setattr(torch, "tensor", lambda values, device: made(values))
    counter_rng._gpu_words.cache_clear()
    yield module
    counter_rng._gpu_words.cache_clear()


def no_compiler(*arguments: Any) -> Any:
    raise RuntimeError("Failed to find C compiler")


def wrong_words(*arguments: Any) -> Any:
    return tuple(word ^ 1 for word in FakeKernel()(*arguments))


@pytest.mark.parametrize(
    "words, said",
    [
        (FakeKernel(), None),
        (no_compiler, "cuda: .*Failed to find C compiler"),
        (wrong_words, "cuda: .*its numbers are wrong"),
    ],
)
def test_a_kernel_that_does_not_run_is_replaced(
    words: Any,
    said: str | None,
    kernel_module: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel_module.words = words
    with caplog.at_level(logging.WARNING):
        found = [counter_rng._gpu_words(CUDA) for _ in range(2)]
    assert found == [None if said else words] * 2
    assert len(caplog.records) == (1 if said else 0)
    assert said is None or re.search(said, caplog.text)


KERNEL_SCRIPT = """
import json, sys, torch
from ddpm_ray.philox_kernel import words
for index, step, seed, blocks, on_device in json.load(sys.stdin):
    of = torch.tensor(step) if on_device else step
    print(json.dumps([w.tolist() for w in words(torch.tensor(index), of, 3, seed, blocks)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_gives_the_same_words() -> None:
    """By Triton's interpreter, which needs no GPU."""
    last, cases = 2**32 - 1, []
    for on_device in (False, True):
        cases.append(([0, 1, last], last, 2**64 - 1, 5, on_device))
        cases.append(([7, 2**31], 0, 2**31, 1, on_device))
        cases.append(([3], 1, 0, 1030, on_device))  # two programs
    done = subprocess.run(
        [sys.executable, "-c", KERNEL_SCRIPT],
        input=json.dumps(cases),
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        text=True,
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    for (index, step, seed, blocks, _), line in zip(cases, done.stdout.splitlines(), strict=True):
        block = torch.arange(blocks)
        right = philox((block, torch.tensor(index)[:, None], step, 3), seed)
        assert json.loads(line) == [torch.as_tensor(word).tolist() for word in right]


@given(
    seeds,
    st.lists(words, min_size=1, max_size=9),
    st.sampled_from([(1,), (7,), (3, 5, 5), (3, 8, 8), (2, 3, 4, 4)]),
    st.integers(1, 9),
)
def test_an_image_draws_the_same_bits_in_any_batch(
    seed: int, images: list[int], shape: tuple[int, ...], size: int
) -> None:
    index = torch.tensor(images)
    whole = normal(seed, Purpose.NOISE, 3, index, shape)
    assert whole.shape == (len(images), *shape)
    assert whole.dtype == torch.float32
    parts = [normal(seed, Purpose.NOISE, 3, part, shape) for part in torch.split(index, size)]
    assert torch.equal(whole, torch.cat(parts))
    backwards = normal(seed, Purpose.NOISE, 3, index.flip(0), shape)
    assert torch.equal(whole, backwards.flip(0))
    steps = uniform_int(seed, Purpose.TIMESTEP, 3, index, 1000)
    alone = [int(uniform_int(seed, Purpose.TIMESTEP, 3, part, 1000)) for part in index]
    assert steps.tolist() == alone


def test_normals_follow_the_normal_law() -> None:
    draws = normal(1, Purpose.NOISE, 0, torch.arange(64), (3, 32, 32)).flatten().double()
    n = len(draws)
    moments = [draws.pow(k).mean().item() for k in (1, 2, 3, 4)]
    spread = [math.sqrt(v / n) for v in (1, 2, 15, 96)]  # of the mean of z, z^2, z^3, z^4
    for found, expected, error in zip(moments, (0, 1, 0, 3), spread, strict=True):
        assert abs(found - expected) < 4 * error
    assert scipy.stats.kstest(draws.numpy(), "norm").pvalue > 1e-3


def test_the_four_normals_of_a_block_are_independent() -> None:
    block = normal(2, Purpose.NOISE, 0, torch.arange(50_000), (4,)).double().T
    for moment in (block, block.square()):  # cos and sin share a radius; squares would show it
        correlation = torch.corrcoef(moment) - torch.eye(4)
        assert correlation.abs().max() < 4 / math.sqrt(50_000)


def test_seed_purpose_step_and_index_each_give_fresh_noise() -> None:
    index = torch.arange(8)
    base = normal(1, Purpose.NOISE, 5, index, (1000,))
    others = [
        normal(2, Purpose.NOISE, 5, index, (1000,)),
        normal(1 + 2**32, Purpose.NOISE, 5, index, (1000,)),
        normal(1, Purpose.SAMPLE_STEP, 5, index, (1000,)),
        normal(1, Purpose.NOISE, 6, index, (1000,)),
        normal(1, Purpose.NOISE, 5, index + 8, (1000,)),
        base.flip(0),
    ]
    for other in others:
        correlation = (base * other).mean(1) * math.sqrt(1000)
        assert correlation.abs().max() < 4.5


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_the_rarest_words_give_finite_normals(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = tuple(torch.tensor([[word]]) for _ in range(4))
    monkeypatch.setattr(counter_rng, "philox", lambda counter, seed: stuck)
    draws = normal(0, Purpose.NOISE, 0, torch.tensor([0]), (4,))
    assert draws.abs().max() < 6.8  # false for nan as well


def test_uniforms_are_the_published_words_and_even() -> None:
    """By hand: 24 bits of each of Random123's words, in order; rows by index, as for normals."""
    first = uniform_float(0, Purpose.TIMESTEP, 0, torch.tensor([0]), (2, 2)).flatten().tolist()
    assert first == [(word >> 8) / 2**24 for word in WORDS_OF_ZERO]
    index = torch.arange(64)
    draws = uniform_float(1, Purpose.LIKELIHOOD, 1, index, (3, 7, 31))
    alone = uniform_float(1, Purpose.LIKELIHOOD, 1, index[9:11], (3, 7, 31))
    assert torch.equal(draws[9:11], alone)
    assert scipy.stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert len(draws.unique(dim=0)) == 64


def test_keys_beyond_32_bits_are_refused_and_not_wrapped() -> None:
    """Image 2^32 would draw the numbers of image 0."""
    last, beyond = torch.tensor([2**32 - 1]), torch.tensor([3, 2**32])
    assert normal(0, Purpose.NOISE, 2**32 - 1, last, (4,)).isfinite().all()
    for index, reason in ((beyond, "index is 4294967296"), (torch.tensor([-1]), "index is -1")):
        for draw in (
            lambda index: normal(0, Purpose.NOISE, 0, index, (4,)),
            lambda index: uniform_float(0, Purpose.NOISE, 0, index, (4,)),
            lambda index: uniform_int(0, Purpose.NOISE, 0, index, 9),
            lambda index: coin(0, Purpose.NOISE, 0, index),
        ):
            with pytest.raises(ValueError, match=reason):
                draw(index)
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match=f"step is {step}"):
            derived_seed(0, Purpose.DROPOUT, step, 0)


def test_purposes_keep_their_numbers() -> None:
    """They are part of what a seed means: runs that go on draw as they began."""
    names = (
        "TIMESTEP NOISE FLIP SAMPLE_START SAMPLE_STEP DROPOUT VALIDATION BOUND LABEL_DROP "
        "OFFSET_NOISE PERTURBATION SELF_CONDITIONING LOW_RESOLUTION LIKELIHOOD POSTERIOR "
        "RECONSTRUCTION INPAINTING_MASK"
    )
    assert [purpose.name for purpose in Purpose][:17] == names.split()
    assert [int(purpose) for purpose in Purpose] == list(range(len(Purpose)))


def test_uniform_integers_are_even_and_in_range() -> None:
    draws = uniform_int(3, Purpose.TIMESTEP, 0, torch.arange(100_000), 10)
    counts = torch.bincount(draws)
    assert len(counts) == 10
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert uniform_int(3, Purpose.TIMESTEP, 0, torch.arange(5), 1).tolist() == [0] * 5


def test_coins_are_fair() -> None:
    heads = int(coin(3, Purpose.FLIP, 0, torch.arange(100_000)).sum())
    assert abs(heads - 50_000) < 4 * math.sqrt(25_000)


def test_derived_seeds_differ_and_suit_torch() -> None:
    draws = {derived_seed(4, Purpose.DROPOUT, s, rank) for s in range(50) for rank in range(4)}
    assert len(draws) == 200
    torch.Generator().manual_seed(max(draws))  # raises for a seed that is no 64-bit number

"""Choices of t against the laws they promise; statistics at fixed seeds, p-values above 1e-3."""

import math
from collections import deque
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.diffusion import NoiseSchedule, schedules, timestep_sampling
from ddpm_ray.diffusion.timestep_sampling import Distribution, SecondMoments

TABLE = torch.tensor([0, 1, 0, 3, 4, 2], dtype=torch.float64)  # t = 2 is never drawn
YES, NO = torch.tensor(True), torch.tensor(False)
CHOICES: dict[str, Callable[[int, int, Tensor], Tensor]] = {
    "uniform": lambda seed, step, at: timestep_sampling.uniform(seed, step, at, 7),
    "low_discrepancy": lambda seed, step, at: timestep_sampling.low_discrepancy(
        seed, step, at, 7, 64
    ),
    "antithetic": lambda seed, step, at: timestep_sampling.antithetic(seed, step, at, 7),
    "weighted": lambda seed, step, at: timestep_sampling.weighted(
        seed, step, at, Distribution.of(TABLE)
    )[0],
}


def test_uniform_draws_what_the_seed_has_always_meant() -> None:
    """Random123's first word for counter and key 0 is 0x6627e8d5, 0.39904 of 2^32."""
    assert timestep_sampling.uniform(0, 0, torch.tensor([0]), 1000).tolist() == [400]


@pytest.mark.parametrize("name", CHOICES)
@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1), size=st.integers(1, 64))
def test_any_division_among_workers_draws_the_same_steps(
    name: str, seed: int, step: int, size: int
) -> None:
    positions = torch.arange(64)
    whole = CHOICES[name](seed, step, positions)
    parts = [CHOICES[name](seed, step, part) for part in positions.split(size)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.int64


@pytest.mark.parametrize("position", [0, 1, 37])
@pytest.mark.parametrize("name", ["uniform", "low_discrepancy", "antithetic"])
def test_at_each_position_every_step_is_as_likely(name: str, position: int) -> None:
    at = torch.tensor([position])
    counts = torch.bincount(torch.cat([CHOICES[name](1, step, at) for step in range(3000)]))
    assert len(counts) == 8
    assert counts[0] == 0
    assert scipy.stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


@given(st.integers(0, 2**64 - 1), st.integers(1, 50), st.integers(1, 200))
def test_a_batch_of_low_discrepancy_has_every_step_equally_often(
    seed: int, num_steps: int, batch: int
) -> None:
    t = timestep_sampling.low_discrepancy(seed, 3, torch.arange(batch), num_steps, batch)
    counts = torch.bincount(t, minlength=num_steps + 1)[1:].tolist()
    assert len(counts) == num_steps
    assert set(counts) <= {batch // num_steps, -(-batch // num_steps)}


@pytest.mark.parametrize("num_steps, batch", [(5, 3), (4, 6), (3, 8)])
def test_low_discrepancy_is_the_paper_s_at_every_offset(
    num_steps: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """frac(u + i / B) in real numbers, u in the middle of each cell that the integers stand for."""
    for cell in range(num_steps * batch):
        u = (cell + 0.5) / (num_steps * batch)
        paper = [math.floor((u + i / batch) % 1 * num_steps) + 1 for i in range(batch)]
        monkeypatch.setattr(counter_rng, "uniform_int", lambda *_, cell=cell: torch.tensor(cell))
        t = timestep_sampling.low_discrepancy(0, 0, torch.arange(batch), num_steps, batch)
        assert t.tolist() == paper


def test_antithetic_pairs_mirror_each_other_and_no_one_else() -> None:
    t = timestep_sampling.antithetic(2, 0, torch.arange(20_000), 1000)
    first, second = t.view(-1, 2).T.double()
    assert torch.equal(first + second, torch.full_like(first, 1001))
    neighbours = torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(len(first))


def test_weighted_draws_its_table_and_weighs_it_away() -> None:
    """p_t w_t L_t summed over the table is the plain mean over the steps that can be drawn."""
    t, weight = timestep_sampling.weighted(4, 0, torch.arange(20_000), Distribution.of(TABLE))
    counts = torch.bincount(t, minlength=6)
    assert counts[[0, 2]].tolist() == [0, 0]
    drawn = [1, 3, 4, 5]
    expected = TABLE[drawn] / TABLE.sum() * len(t)
    assert scipy.stats.chisquare(counts[drawn].numpy(), expected.numpy()).pvalue > 1e-3
    of_step = torch.stack([weight[t == s][0] for s in drawn])
    losses = torch.tensor([3.0, 0.5, 7.0, 11.0], dtype=torch.float64)
    mean = (TABLE[drawn] / TABLE.sum() * of_step * losses).sum()
    assert mean.item() == pytest.approx((3 + 0.5 + 7 + 11) / 5)  # 5 steps, of which one never
    assert torch.equal(weight, of_step[torch.tensor([0, 0, 0, 1, 2, 3])[t]])


@pytest.mark.parametrize(
    "table, first, last", [([0.0, 1, 2, 1], 1, 3), ([0.0, 0, 1, 1, 0], 2, 3), ([0.0, 5], 1, 1)]
)
def test_the_rarest_words_still_draw_a_step_of_the_table(
    table: list[float], first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Distribution.of(torch.tensor(table, dtype=torch.float64))
    for word, step in ((0, first), (2**31 - 1, last)):
        monkeypatch.setattr(counter_rng, "uniform_int", lambda *_, word=word: torch.tensor([word]))
        assert timestep_sampling.weighted(0, 0, torch.arange(1), wanted)[0].tolist() == [step]


@pytest.mark.parametrize("mean, deviation", [(-1.2, 1.2), (0.5, 0.7)])
@pytest.mark.parametrize(
    "alpha_bar", [schedules.linear(1000), schedules.cosine(1000), schedules.edm(1000)]
)
def test_log_sigma_is_normal_between_the_schedule_s_ends(
    alpha_bar: Tensor, mean: float, deviation: float
) -> None:
    """SciPy's truncated normal, in the middle between two steps; they are 1/2 % of it at most."""
    table = timestep_sampling.log_normal(NoiseSchedule(alpha_bar), mean, deviation)
    assert table[0] == 0
    sigma = ((1 - alpha_bar[1:]) / alpha_bar[1:]).log() / 2
    low, high = ((sigma[[0, -1]] - mean) / deviation).tolist()
    law = scipy.stats.truncnorm(low, high, loc=mean, scale=deviation)
    between = (sigma[1:] + sigma[:-1]) / 2
    assert table[1:-1].cumsum(0).numpy() == pytest.approx(law.cdf(between.numpy()), abs=0.005)


def test_a_step_without_signal_is_not_drawn_by_log_sigma() -> None:
    table = timestep_sampling.log_normal(NoiseSchedule(torch.tensor([1, 0.9, 0.5, 0]).double()))
    assert table[3] == 0
    assert table.sum().item() == pytest.approx(1)
    alone = timestep_sampling.log_normal(NoiseSchedule(torch.tensor([1, 0.5]).double()))
    assert alone.tolist() == [0, 1]


losses_of_three = st.lists(
    st.lists(st.tuples(st.integers(1, 3), st.floats(0, 9)), max_size=40), min_size=1, max_size=4
)


@given(losses_of_three, losses_of_three)
def test_second_moments_are_those_of_the_last_ten_losses_of_each_step(
    before: list[list[tuple[int, float]]], after: list[list[tuple[int, float]]]
) -> None:
    """Against a queue of ten for each step, filled one loss at a time; with a restart between."""
    queues = {t: deque[float](maxlen=10) for t in (1, 2, 3)}
    moments = SecondMoments.empty(3)
    for batches in (before, after):
        resumed = SecondMoments.empty(3)
        resumed.load_state_dict({k: v.clone() for k, v in moments.state_dict().items()})
        moments = resumed
        for batch in batches:
            for t, loss in batch:
                queues[t].append(loss)
            t_and_loss = torch.tensor(batch, dtype=torch.float64).view(-1, 2)
            moments.update(t_and_loss[:, 0].long(), t_and_loss[:, 1], YES)
            moments.update(t_and_loss[:, 0].long(), t_and_loss[:, 1] * math.nan, NO)
    sizes = [math.sqrt(sum(x * x for x in q) / 10) for q in queues.values()]
    if min(map(len, queues.values())) < 10 or not any(sizes):
        sizes = [1.0] * 3
    expected = [0.0, *(0.999 * size / sum(sizes) + 0.001 / 3 for size in sizes)]
    assert moments.probability().tolist() == pytest.approx(expected)


def test_a_step_is_drawn_in_proportion_to_its_losses_once_all_are_known() -> None:
    """Nine losses of one step leave all alike; the tenth makes 3 to 1 of them, but for 0.001."""
    moments = SecondMoments.empty(2)
    t = torch.tensor([1] * 10 + [2] * 9)
    moments.update(t, torch.where(t == 1, 3.0, 1.0), YES)
    assert moments.probability().tolist() == [0, 0.5, 0.5]
    moments.update(torch.tensor([2]), torch.tensor([-1.0]), YES)  # below 0 counts by its size
    assert moments.probability().tolist() == pytest.approx([0, 0.74975, 0.25025])


def test_losses_of_nothing_but_0_leave_all_steps_alike() -> None:
    moments = SecondMoments.empty(2)
    moments.update(torch.tensor([1, 2] * 10), torch.zeros(20), YES)
    assert moments.probability().tolist() == [0, 0.5, 0.5]


def test_a_table_of_another_length_is_not_taken_over() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        SecondMoments.empty(3).load_state_dict(SecondMoments.empty(4).state_dict())

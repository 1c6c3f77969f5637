"""Limits of a server: laws of the token bucket and of the bound of accepted work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.serving.limits import OverloadedError, QueueLimit, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


Requests = st.lists(
    st.tuples(st.floats(0, 5), st.floats(0.01, 30)), min_size=1, max_size=40
)  # (seconds since the one before, units)


def take(bucket: TokenBucket, units: float) -> None:
    """Spend units as the job table does: what is affordable is known before the price is."""
    if units > bucket.affordable:
        bucket.require(units)
    bucket.charge(units)


@given(requests=Requests, per_s=st.floats(0.1, 10), burst=st.floats(1, 20))
def test_no_stretch_of_time_has_more_than_the_rate(
    requests: list[tuple[float, float]], per_s: float, burst: float
) -> None:
    """Of any stretch, all but the last request fit into burst + rate x its length."""
    clock = Clock()
    bucket, taken = TokenBucket(per_s, burst, clock=clock), []
    for wait_s, units in requests:
        clock.now_s += wait_s
        try:
            take(bucket, units)
        except OverloadedError:
            continue
        taken.append((clock.now_s, units))
    for first in range(len(taken)):
        for last in range(first + 1, len(taken)):
            before = sum(units for _, units in taken[first:last])
            allowed = burst + per_s * (taken[last][0] - taken[first][0])
            assert before <= allowed * (1 + 1e-6)


@given(requests=Requests, per_s=st.floats(0.1, 10), burst=st.floats(1, 20))
def test_a_refused_request_is_accepted_after_the_stated_time(
    requests: list[tuple[float, float]], per_s: float, burst: float
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_s, burst, clock=clock)
    for wait_s, units in requests:
        clock.now_s += wait_s
        try:
            take(bucket, units)
        except OverloadedError as refused:
            clock.now_s += refused.seconds * (1 + 1e-6) + 1e-6
            take(bucket, units)


def test_the_queue_is_bounded_by_the_time_of_its_work() -> None:
    load = (0, 0.0)
    limit = QueueLimit(60.0, lambda: load)
    limit.require_room(10**9)  # nothing is known yet
    load = (0, 10.0)
    limit.require_room(10**9)  # nothing waits
    load = (500, 10.0)
    limit.require_room(100)
    with pytest.raises(OverloadedError, match=r"10.1 s, and their sum .* at most 60 s") as found:
        limit.require_room(101)
    assert found.value.retry_after_s == 1
    with pytest.raises(OverloadedError, match="try again in 40 s"):
        limit.require_room(500)


@pytest.mark.parametrize("name", ["per_s", "burst"])
def test_a_bucket_without_a_rate_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        TokenBucket(per_s=float(name != "per_s"), burst=float(name != "burst"))
    bucket = TokenBucket(2.0, 3.0, clock=Clock())
    take(bucket, 3)
    with pytest.raises(
        OverloadedError, match="takes 1 units, and a client has 2 a second and 3 at"
    ):
        take(bucket, 1)


@given(left=st.integers(1, 10**6), rows=st.integers(1, 10**6), rate=st.floats(0.1, 1e4))
def test_room_is_there_once_the_stated_time_has_passed(left: int, rows: int, rate: float) -> None:
    """If nobody else asks: the work that waits has shrunk by then."""
    try:
        QueueLimit(30.0, lambda: (left, rate)).require_room(rows)
    except OverloadedError as refused:
        rest = max(0, int(left - refused.seconds * rate * (1 + 1e-9)))
        QueueLimit(30.0, lambda: (rest, rate)).require_room(rows - 1)

"""Each metric reaches MLflow once and in order, in windows that a killed run keeps to."""

from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.reporting import Row
from ddpm_ray.tracking.row_queue import MAX_DUPLICATES, RowQueue
from ddpm_ray.tracking.run_info import MAX_METRICS, MetricRow

LOG_EVERY = 4


def logged(steps: range) -> list[Row]:
    """What a run logs: each step's own, some skipped, and sums of each LOG_EVERY steps."""
    rows = []
    for step in steps:
        metrics = {"train/loss": 1 / step, "train/lr": 0.1 * step}
        if step % 5 == 3:
            metrics = {"train/skipped": 1.0}
        if step % LOG_EVERY == 0:
            metrics["train/images_per_s"] = float(step)
        rows.append(Row(step, metrics))
        if step % 6 == 0:  # known before the losses of the newest steps are reported
            rows.insert(max(0, len(rows) - 1 - step % 4), Row(step, {"eval/fid": 100 / step}))
    return rows


class Store:
    """An MLflow that may fail after it has stored a call's rows, as a lost answer leaves it."""

    def __init__(self) -> None:
        self.rows: list[MetricRow] = []
        self.sizes: list[int] = []

    def newest(self) -> dict[str, int]:
        return {key: step for key, _, step in sorted(self.rows, key=lambda row: row[2])}

    def take(self, queue: RowQueue, *, fails: bool = False, stores: bool = True) -> None:
        batch, count = queue.batch()
        self.sizes.append(len(batch))
        if stores:
            self.rows += batch
        if fails:
            queue.doubt(count)
        else:
            queue.acknowledge(count)


def drained(queue: RowQueue, store: Store) -> None:
    queue.skip_stored(store.newest())
    while len(queue):
        store.take(queue)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 39), st.integers(0, 39), st.data())
def test_a_killed_run_s_rows_are_those_of_an_unbroken_one(
    every: int, last: int, killed: int, saved: int, data: st.DataObject
) -> None:
    """Whatever the window, the step of the checkpoint, of the kill, and what MLflow had by then."""
    killed, whole = min(killed, last), Store()
    saved = min(saved, killed)
    queue = RowQueue([], every, last)
    queue.add(logged(range(1, last + 1)))
    drained(queue, whole)

    broken, queue = Store(), RowQueue([], every, last)
    queue.add(logged(range(1, saved + 1)))
    unsent = queue.rows()  # into the checkpoint; MLflow may take any of them after that
    queue.add(logged(range(saved + 1, killed + 1)))
    while len(queue) and data.draw(st.booleans()):
        broken.take(queue)
    if len(queue) and data.draw(st.booleans()):
        broken.take(queue, fails=True)
    queue = RowQueue(unsent, every, last)
    queue.add(logged(range(saved + 1, last + 1)))
    drained(queue, broken)
    assert sorted(broken.rows) == sorted(whole.rows)
    assert queue.rows() == []  # the last window is complete at the last step


def test_windows_are_means_but_for_what_is_counted_or_rare() -> None:
    queue, store = RowQueue([], 5, 7), Store()
    queue.add([Row(s, {"train/loss": float(s), "train/skipped": 1.0}) for s in (1, 2, 5, 6, 7)])
    queue.add([Row(7, {"eval/fid": 3.0})])
    drained(queue, store)
    assert store.rows == [
        ("train/loss", (1 + 2 + 5) / 3, 5),
        ("train/skipped", 3.0, 5),
        ("train/loss", 6.5, 7),
        ("train/skipped", 2.0, 7),
        ("eval/fid", 3.0, 7),
    ]


def test_an_incomplete_window_waits_in_the_checkpoint_and_is_not_undelivered() -> None:
    queue = RowQueue([], 5, 100)
    queue.add(rows := [Row(step, {"train/loss": 1.0}) for step in (1, 2, 3)])
    assert (queue.rows(), len(queue)) == (rows, 0)


def test_one_step_windows_are_the_rows_themselves() -> None:
    queue, rows = RowQueue([]), logged(range(1, 30))
    queue.add(rows)
    assert queue.rows() == rows


def test_what_may_be_there_already_goes_in_small_calls_until_it_is_through() -> None:
    """A call of 1,000 metrics failed, and is asked for: of 333 rows 100 were stored."""
    queue, store = RowQueue(Row(s, {"a": 1.0, "b": 2.0, "c": 3.0}) for s in range(1, 1001)), Store()
    store.take(queue, fails=True, stores=False)
    assert store.sizes == [999]
    store.rows = [(key, 1.0, step) for step in range(1, 101) for key in "abc"]
    drained(queue, store)
    assert max(store.sizes[1:15]) <= MAX_DUPLICATES
    assert max(store.sizes[-3:]) > MAX_METRICS // 4  # and in whole ones after it
    assert len(store.rows) == len(set(store.rows)) == 3000


def test_a_row_of_more_metrics_than_a_call_takes_is_cut() -> None:
    queue, store = RowQueue([Row(1, {f"m{k}": 0.0 for k in range(2500)})]), Store()
    drained(queue, store)
    assert len(store.rows) == 2500
    assert max(store.sizes) <= MAX_METRICS

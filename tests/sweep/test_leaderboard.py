"""A leaderboard loses no trial, ranks by score alone, and shows values letter by letter."""

import html.parser
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.sweep.leaderboard import TEXT_COLUMNS, as_markdown, as_text
from ddpm_ray.sweep.leaderboard_html import as_html
from ddpm_ray.sweep.standings import STATUSES, Standing, standings, status_counts
from ddpm_ray.sweep.trial_store import Status, Trial

METRIC = "eval/fid"
SCORES = st.none() | st.floats() | st.integers(0, 5).map(float)


def finished(number: int, score: float, half_width: float | None = None, **values: Any) -> Trial:
    metrics = {METRIC: score}
    if half_width is not None:
        metrics |= {f"{METRIC}_low": score - half_width, f"{METRIC}_high": score + half_width}
    outcome = {"metrics": metrics, "worker_s": 100.0, "busy_s": 80.0, "step": 500}
    return Trial(number, values, status="finished", outcome=outcome)


def lost(number: int, status: Status, *losses: float, reason: str = "") -> Trial:
    validation_losses = [
        {"order": 0, "step": 10 * i, "loss": loss} for i, loss in enumerate(losses, 1)
    ]
    return Trial(
        number, {"lr": 0.1}, status=status, reason=reason, validation_losses=validation_losses
    )


@st.composite
def sweeps(draw: st.DrawFn) -> list[Trial]:
    """Trials of every end, each reporting some of what it might; scores often coincide."""
    trials = []
    for number in range(draw(st.integers(0, 12))):
        status: Status = draw(st.sampled_from(STATUSES))
        losses = draw(st.lists(st.floats(), max_size=2))
        trial = lost(number, status, *losses, reason=draw(st.text(max_size=90)))
        trial.values = draw(st.dictionaries(st.text(max_size=9), st.text(max_size=60), max_size=2))
        names = METRIC, f"{METRIC}_low", f"{METRIC}_high"
        metrics = {name: value for name in names if (value := draw(SCORES)) is not None}
        outcome = {"metrics": metrics, "worker_s": draw(SCORES), "busy_s": draw(SCORES)}
        kept = draw(st.sets(st.sampled_from(sorted(outcome))))
        trial.outcome = {key: outcome[key] for key in kept}
        trials.append(trial)
    return trials


@given(sweeps())
def test_a_higher_psnr_is_as_a_lower_distance(trials: list[Trial]) -> None:
    """Every trial's place by PSNR is that by a distance with the opposite sign."""
    by_distance = standings(trials, METRIC)
    mirrored = []
    for trial in trials:
        metrics = trial.outcome.get("metrics", {})
        ends = {"eval/psnr": METRIC, "eval/psnr_low": f"{METRIC}_high"}
        ends["eval/psnr_high"] = f"{METRIC}_low"
        negated = {name: -metrics[of] for name, of in ends.items() if of in metrics}
        mirrored.append(replace(trial, outcome=trial.outcome | {"metrics": negated}))
    by_psnr = standings(mirrored, "eval/psnr")
    assert [(row.number, row.place) for row in by_psnr] == [
        (row.number, row.place) for row in by_distance
    ]
    assert [row.like_best for row in by_psnr] == [row.like_best for row in by_distance]
    assert "Higher is better." in as_markdown(by_psnr, "eval/psnr")


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its tags, its text, and its table by class of cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.cells: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "td":
            self.cells.append((dict(attrs).get("class") or "", ""))

    def handle_data(self, data: str) -> None:
        if self.cells:
            kind, text = self.cells[-1]
            self.cells[-1] = kind, text + data

    def column(self, kind: str) -> list[str]:
        return [text.strip() for name, text in self.cells if name == kind]


@given(sweeps())
def test_every_trial_has_one_row_wherever_it_is_shown(trials: list[Trial]) -> None:
    rows = standings(trials, METRIC)
    numbers = [str(row.number) for row in rows]
    assert sorted(numbers, key=int) == [str(trial.number) for trial in trials]
    assert Page(as_html(rows, METRIC, "A sweep")).column("trial") == numbers
    row = re.compile(rf"[ \d~]{{6}} *(\d+) (?:{'|'.join(STATUSES)})", re.M)
    assert row.findall(as_text(rows, METRIC)) == numbers
    table = as_markdown(rows, METRIC, top=99).splitlines()[2 : 2 + len(rows)]
    assert [line.split(" | ")[1] for line in table] == numbers


@given(sweeps())
def test_places_count_the_better_scores(trials: list[Trial]) -> None:
    """Competition ranking: equal scores share a place, and the next one counts both."""
    rows = standings(trials, METRIC)
    scores = [row.score for row in rows if row.score is not None]
    for row in rows:
        if row.score is None:
            assert row.place is None
            assert not row.like_best
        else:
            assert row.status == "finished"
            assert math.isfinite(row.score)
            assert row.place == 1 + sum(other < row.score for other in scores)


def test_ends_stand_in_order_and_stopped_ones_by_the_loss_at_which_they_stopped() -> None:
    trials = [
        lost(0, "failed", 0.01),
        lost(1, "pruned"),
        lost(2, "stopped", 0.1, 0.9),
        lost(3, "stopped", 0.8, 0.2),
        lost(4, "finished"),  # its evaluation reported nothing
        finished(5, 3.0),
        lost(6, "running", 0.5),
        finished(7, 2.0),
        finished(8, math.nan),
    ]
    rows = standings(trials, METRIC)
    assert [row.number for row in rows] == [7, 5, 4, 8, 6, 3, 2, 1, 0]
    assert [row.loss for row in rows if row.status == "stopped"] == [0.2, 0.9]
    assert status_counts(rows) == "4 finished, 1 running, 2 stopped, 1 pruned, 1 failed"


@pytest.mark.parametrize(
    "half_width, alike",
    [(0.4, [False, False, False]), (0.6, [False, True, False]), (None, [False, False, False])],
)
def test_trials_that_overlap_the_best_are_marked(
    half_width: float | None, alike: list[bool]
) -> None:
    """Scores 1 apart: intervals of 0.6 to each side meet the neighbour's and no further one's."""
    rows = standings([finished(i, 2.0 + i, half_width) for i in range(3)], METRIC)
    assert [row.like_best for row in rows] == alike
    assert ("≈" in as_markdown(rows, METRIC)) == any(alike)
    assert ("~" in as_text(rows)) == any(alike)


def test_markup_in_a_page_is_inert() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'"
    trials = [finished(0, 1.0, 0.1, **{evil: evil}), lost(1, "failed", reason=evil)]
    clean, page = (
        Page(as_html(standings(trials, metric), metric, title))
        for trials, metric, title in (([finished(0, 1.0)] * 2, "m", "t"), (trials, METRIC, evil))
    )
    assert set(page.tags) <= {*clean.tags, "svg", "line", "circle"}
    assert "onerror" not in page.attributes
    assert evil in page.column("l w"), "shown letter by letter"


@pytest.mark.parametrize("loads", ["src=", "href=", "url(", "@import", "http://", "https://"])
def test_a_page_needs_nothing_from_elsewhere(loads: str) -> None:
    assert loads not in as_html(standings([finished(0, 1.0, 0.1)], METRIC), METRIC, "A sweep")


@given(st.text())
def test_no_value_breaks_a_markdown_table(value: str) -> None:
    """GFM splits cells at pipes without a backslash before them, wherever they stand."""
    row = as_markdown(standings([finished(0, 1.0, lr=value)], METRIC), METRIC).splitlines()[2]
    bare = row.replace("\\\\", "").replace("\\|", "")
    assert bare.count("|") == 8
    assert "<" not in row


@given(sweeps())
def test_a_terminal_gets_short_plain_lines(trials: list[Trial]) -> None:
    text = as_text(standings(trials, METRIC), METRIC)
    assert max(map(len, text.splitlines())) <= TEXT_COLUMNS
    assert all(line.isprintable() for line in text.split("\n"))


def test_values_that_differ_are_never_cut() -> None:
    """Two trials that differ in the last of many values: nobody could tell which one is best."""
    same: dict[str, Any] = {f"model.option_{i}": "x" * 9 for i in range(6)}
    trials = [finished(i, i, **same, **{"training.learning_rate": i / 64}) for i in (1, 2)]
    for shown in (as_text, lambda rows: as_markdown(rows, METRIC).replace("\\", "")):
        words = shown(standings(trials, METRIC)).split()
        assert {"learning_rate=0.01562", "learning_rate=0.03125"} <= set(words)


def test_a_long_reason_is_cut_and_loses_its_colours() -> None:
    trial = lost(0, "failed", reason="\x1b[31mRayTaskError\x1b[0m: out of\nmemory, " + "x" * 99)
    line = as_text(standings([trial], METRIC)).splitlines()[1]
    assert line.endswith("xxx...")
    assert "RayTaskError: out of memory" in line


def test_all_of_why_a_trial_failed_is_reported() -> None:
    """Below the table, also of one that has no row in it any more."""
    why = "step 1: the gradient's norm is nan, from " + " ".join(f"layer{i}" for i in range(30))
    rows = standings([finished(i, i) for i in range(30)] + [lost(30, "failed", reason=why)], METRIC)
    text = as_text(rows, most=25)
    assert f"trial 30 failed: {why}" in " ".join(text.split())
    assert text.splitlines()[-1].startswith("31 trials: ")


def test_what_does_not_fit_is_counted() -> None:
    rows = standings([finished(i, i) for i in range(30)] + [lost(30, "failed")], METRIC)
    assert "... and 6 more: 5 finished, 1 failed\n" in as_text(rows, most=25)
    assert as_markdown(rows, METRIC).count("\n| ") == 1 + 10
    assert as_markdown(rows, METRIC).count("31 trials: 30 finished, 1 failed") == 1


def test_cost_and_overhead_are_summed_over_what_is_known() -> None:
    """Trial 1 does not say how long it was busy, so its seconds count and its overhead does not."""
    trials = [finished(i, 1.0 + i) for i in range(3)]
    del trials[1].outcome["busy_s"]
    rows = standings([*trials, lost(3, "failed")], METRIC)
    assert [row.overhead_s for row in rows] == [20, None, 20, None]
    for shown in (as_text(rows), as_markdown(rows, METRIC), as_html(rows, METRIC, "A sweep")):
        assert "300 worker-seconds, overhead 20 %" in shown


def test_the_page_says_what_an_interval_covers() -> None:
    rows: list[Standing] = standings([finished(0, 1.0, 0.1), lost(1, "stopped", 0.3)], METRIC)
    page = as_html(rows, METRIC, "A sweep")
    assert "covers the randomness of sampling, not of training" in page
    assert "stopped early have no final score" in page

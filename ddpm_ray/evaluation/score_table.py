"""Scores for people: each with its interval or deviation, which are metrics of their own."""

from collections.abc import Mapping

SPREADS = ("_low", "_high", "_deviation", "_infinity_error")  # endings of metric names


def score_table(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return (name, value, spread) of each score; the spread is `[low, high]`, `± x` or empty."""
    return [
        (name, f"{metrics[name]:.4g}", _spread(name, metrics)) for name in scores_alone(metrics)
    ]


def scores_alone(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are scores, without the ends of intervals and the deviations."""
    return {name: value for name, value in metrics.items() if not name.endswith(SPREADS)}


def _spread(name: str, metrics: Mapping[str, float]) -> str:
    if f"{name}_low" in metrics:
        return f"[{metrics[f'{name}_low']:.4g}, {metrics[f'{name}_high']:.4g}]"
    for ending in ("_deviation", "_error"):  # of an Inception Score, of an extrapolation
        if name + ending in metrics:
            return f"± {metrics[name + ending]:.4g}"
    return ""

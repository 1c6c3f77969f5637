"""Rules for the decays and the relative widths of EMAs."""

from collections.abc import Iterator

PLAIN_MEAN = 0.2886  # relative width of the plain mean; wider power profiles favour the start


def wrong_decays(key: str, decays: tuple[float, ...]) -> Iterator[str]:
    """Yield a line for each error in `decays`, the value of `key`."""
    if wrong := [decay for decay in decays if not 0 < decay < 1]:
        yield f"{key} holds {wrong[0]}; a decay per step is above 0 and below 1: try 0.999"
    yield from _doubled(key, decays)


def wrong_widths(key: str, widths: tuple[float, ...]) -> Iterator[str]:
    """Yield a line for each error in `widths`, the value of `key`."""
    if wrong := [width for width in widths if not 0 < width < PLAIN_MEAN]:
        yield (
            f"{key} holds {wrong[0]}; a relative width is above 0 and below {PLAIN_MEAN}, that of "
            f"the plain mean: try 0.1"
        )
    yield from _doubled(key, widths)


def wrong_snapshots(widths: tuple[float, ...], every_steps: int) -> Iterator[str]:
    """Yield a line for each error in the widths of the EMA snapshots of a run, or if none is set.

    `every_steps`: between snapshots; 0: none are kept.
    """
    yield from wrong_widths("training.ema_snapshot_widths", widths)
    if every_steps and not widths:
        yield (
            f"training.ema_snapshot_every_steps is {every_steps} and training.ema_snapshot_widths "
            f"is empty; name two widths: try [0.05,0.1]"
        )


def _doubled(key: str, values: tuple[float, ...]) -> Iterator[str]:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        yield f"{key} holds {twice[0]} twice; each has one name in a checkpoint: leave one out"

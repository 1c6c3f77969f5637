"""Short names of trials: the values that a trial varies, as `T=1000 linear rescaled`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

T_KEY = "schedule.num_steps"


def short_name(values: Mapping[str, Any], without: str = "") -> str:
    """Return `values`, by dotted key, as text: T first, then the schedule, then all other options.

    An option is named by the last part of its key, or by the whole key if two options share that
    part. The option `without` is left out.
    """
    shown = {key: value for key, value in values.items() if key != without}
    ordered = sorted(shown, key=lambda key: (key != T_KEY, not key.startswith("schedule.")))
    uses = Counter(key.rpartition(".")[2] for key in shown)
    parts = []
    for key in ordered:
        last = key.rpartition(".")[2]
        parts.append(_part(key, last if uses[last] == 1 else key, shown[key]))
    return " ".join(parts)


def _part(key: str, name: str, value: Any) -> str:
    match key, value:
        case "schedule.num_steps", _:
            return f"T={value}"
        case "schedule.kind", str():
            return value
        case "schedule.rescale", bool():
            return "rescaled" if value else "not rescaled"
        case _:
            return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"

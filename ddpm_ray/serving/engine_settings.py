"""Sizes of the batches of an engine, and limits of the memory that its jobs take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """Rows of a network call, and images of the jobs that run."""

    width: int = 8  # most rows of one network call; guidance takes two for an image
    exact: bool = False  # all batches have `width` rows: equal bits whatever the other jobs
    max_images: int = 64  # of all jobs that run; others wait

    def __post_init__(self) -> None:
        for name in ("width", "max_images"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"engine.{name} is {value}; it must be at least 1")

"""Options of encoding a data set to latents or embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ddpm_ray.config.option_fields import option

EncodeDevice: TypeAlias = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class EncodeConfig:
    """One data set to encode."""

    flipped: bool = option(
        False, "also encode each image mirrored, to latents for training with data.flip=true"
    )
    batch_size: int = option(
        32,
        "images per encoder call; bounds memory, and affects the last bits of the result",
        at_least=1,
    )
    device: EncodeDevice = option(
        "auto", "device of the encoder; auto: GPUs if the cluster has any"
    )
    num_workers: int = option(
        0, "parallel Ray actors; 0: one per GPU of the cluster, or per CPU", at_least=0
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")

    def problems(self) -> Iterator[str]:
        """Yield nothing: no two options can contradict each other."""
        yield from ()

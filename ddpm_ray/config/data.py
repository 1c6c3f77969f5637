"""Options of the training data."""

from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.option_fields import option

MIB = 2**20
# Help of the option `autoencoder` of each job that takes a trained model.
MOVED_AUTOENCODER = (
    "folder or URL of a latent model's autoencoder, if it has moved; empty: the one that the model "
    "names"
)


@dataclass(frozen=True)
class DataConfig:
    """The training images: where their shards are, and how they are read."""

    url: str = option("", "folder or fsspec URL of the packed shards")
    source: Literal["", "digits"] = option(
        "", "built-in data set to pack into data.url if it holds no shards yet; empty: none"
    )
    autoencoder: str = option(
        "",
        "folder or URL of the autoencoder of the latents in data.url, if it has moved; empty: the "
        "one that they name",
    )
    flip: bool = option(
        False, "mirror each image left-right with probability 1/2", defines_run=True
    )
    lanes: int | None = option(
        None,
        "number of shard streams that a batch is drawn from; must divide the batch size; null: 8, "
        "or enough for all workers, as fixed at a run's first start",
        at_least=1,
        defines_run=True,
    )
    shuffle_window_samples: int | None = option(
        None,
        "size of the shuffle buffer in samples, all lanes together; null: 8192, or what 1 GiB a "
        "worker holds, as fixed at a run's first start",
        at_least=1,
        defines_run=True,
    )
    shuffle_window_bytes: int | None = option(
        None,
        "size of the shuffle buffer in decoded bytes; give this or shuffle_window_samples",
        at_least=MIB,
        defines_run=True,
        instead_of="shuffle_window_samples",
    )
    cache_bytes: int = option(
        8192 * MIB,
        "size in bytes of the node-local cache of remote shards; 0: no cache",
        at_least=0,
    )
    cache_dir: str = option("", "folder of the cache of remote shards; empty: ~/.cache/ddpm-ray")

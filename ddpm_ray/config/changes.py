"""The options that a continued run may change, if `change` names them, and why no others."""

from collections.abc import Iterator

from ddpm_ray.config.option_fields import walk
from ddpm_ray.config.reading.errors import nearest_key

FIXED = {  # reason why a key that defines a run may not change, by the start of the key
    "seed": "all random numbers of the run are drawn from it",
    "data.": "the images of each step depend on it",
    "schedule.": "the network has learned the noise levels of this schedule",
    "objective.": "the network has learned this objective, and losses could not be compared",
    "embedding.": "the network has learned from embeddings of this width, left out this often",
    "autoencoder.": "an autoencoder is one network, trained on one loss",
    "contrastive.": "the encoders have learned this loss, and the checkpoints have these shapes",
    "training.global_batch_size": "the order of the images is counted in batches of this size",
    "training.reduction": "the gradients of the whole run are summed in one way",
    "training.ema_": "the checkpoints hold these EMAs",
    "training.init_from": "the run began from these weights",
    "": "the tensors of the checkpoints have the shapes of this network",
}


def change_problems(config: object, keys: tuple[str, ...]) -> Iterator[str]:
    """Yield a line for each key in `keys`, the value of `change`, that cannot be changed."""
    known = {key: meta for key, _, meta in walk(config)}
    for key in keys:
        if key not in known:
            yield f"change names {key!r}: no such key{nearest_key(type(config), key)}"
        elif known[key]["defines_run"] and not known[key]["may_change"]:
            reason = next(FIXED[start] for start in FIXED if key.startswith(start))
            yield (
                f"change names {key}, which cannot change: {reason}; start a run with another "
                f"name= from the weights of this one: training.init_from="
            )

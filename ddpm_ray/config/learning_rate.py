"""Rules for the warm-up and the decay of the learning rate."""

from collections.abc import Iterator

TO_ZERO = ("cosine", "linear")  # decays that reach 0 at training.steps


def wrong_warm_up(
    warmup_steps: int, warmup_images: int, decay: str, steps: int, global_batch_size: int
) -> Iterator[str]:
    """Yield a line for a warm-up that is set twice, or ends after a decay to 0 has ended."""
    if warmup_steps and warmup_images:
        yield (
            f"training.warmup_images is {warmup_images} and training.warmup_steps {warmup_steps}; "
            f"set one of the two and leave the other 0"
        )
    for key, value, most in (
        ("warmup_steps", warmup_steps, steps),
        ("warmup_images", warmup_images, steps * global_batch_size),
    ):
        if decay in TO_ZERO and value >= most > 0:
            yield (
                f"training.{key} is {value}; with training.learning_rate_decay={decay} the "
                f"warm-up must end before training.steps {steps}: set it below {most}"
            )


def wrong_decay(decay: str, reference_images: int, core_seconds: float) -> Iterator[str]:
    """Yield a line for a decay whose beginning or end is not known."""
    if (decay == "inverse_sqrt") != bool(reference_images):
        remedy = "set it to 0" if reference_images else "say after how many images the rate falls"
        yield (
            f"training.learning_rate_reference_images is {reference_images} and "
            f"training.learning_rate_decay {decay}; {remedy}"
        )
    if decay in TO_ZERO and core_seconds:
        yield (
            f"training.core_seconds is {core_seconds:g}, which ends the run before "
            f"training.learning_rate_decay={decay} has reached 0 at training.steps: use "
            f"training.learning_rate_decay=inverse_sqrt or none"
        )

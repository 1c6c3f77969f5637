"""Options of training a tokenizer on the captions of a data set."""

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.text import FEWEST_TOKENS, SHORTEST_TEXT, TextConfig

DEFAULTS = TextConfig()


@dataclass(frozen=True)
class TokenizeConfig:
    """One tokenizer to train."""

    vocabulary: int = option(
        DEFAULTS.vocabulary, "number of tokens, at most", at_least=FEWEST_TOKENS
    )
    length: int = option(
        DEFAULTS.length,
        "text.length of the runs to come: the captions that it would cut are counted",
        at_least=SHORTEST_TEXT,
    )

    def problems(self) -> Iterator[str]:
        """Yield nothing: no two options can contradict each other."""
        yield from ()

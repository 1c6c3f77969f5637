"""Options of texts as conditioning: the tokenizer and the text encoder."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from ddpm_ray.config.option_fields import option, shown

FEWEST_TOKENS = 256 + 2  # of a trained tokenizer: one for each byte, the start and the end
SHORTEST_TEXT = 3  # tokens: its start, one of a word, its end
TextEncoderKind: TypeAlias = Literal["none", "transformer"]


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, whose vectors the network attends to, and its tokenizer."""

    encoder: TextEncoderKind = option(
        "none",
        "text encoder; none: images without text; transformer: CLIP's, trained with the network",
        defines_run=True,
    )
    tokenizer: str = option(
        "",
        "folder or URL of a tokenizer.json; empty: trained on the captions of data.url at the "
        "run's first start",
    )
    vocabulary: int = option(
        4096,
        "trained tokenizer: number of tokens, at most",
        at_least=FEWEST_TOKENS,
        defines_run=True,
    )
    length: int = option(
        32, "tokens of each text; longer texts are cut", at_least=SHORTEST_TEXT, defines_run=True
    )
    width: int = option(256, "transformer: width of its vectors", at_least=1, defines_run=True)
    depth: int = option(4, "transformer: number of blocks", at_least=1, defines_run=True)
    heads: int = option(4, "transformer: heads of each attention", at_least=1, defines_run=True)

    def problems(self) -> Iterator[str]:
        """Yield a line for sizes that do not fit together, and for options without an encoder."""
        if self.width % self.heads:
            yield (f"text.width is {self.width}; it must be a multiple of text.heads {self.heads}")
        if self.encoder == "none":
            for item in fields(self):
                if (value := getattr(self, item.name)) != item.default:
                    yield (
                        f"text.{item.name} is {shown(value)}, which text.encoder=none does not "
                        f"read; leave it out, or set text.encoder=transformer"
                    )

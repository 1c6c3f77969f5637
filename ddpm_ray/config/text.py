"""Options of texts as conditioning: the tokenizer and the text encoder."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from ddpm_ray.config.option_fields import option, shown

FEWEST_TOKENS = 256 + 2  # of a trained tokenizer: one for each byte, the start and the end
SHORTEST_TEXT = 3  # tokens: its start, one of a word, its end
FrozenTextKind: TypeAlias = Literal["contrastive", "transformers"]
TextEncoderKind: TypeAlias = Literal["none", "transformer", "contrastive", "transformers"]
FROZEN: dict[TextEncoderKind, str] = {  # what text.model is an example of
    "contrastive": "runs/encoders",
    "transformers": "models/clip",
}
OF_RUN = "model", "pooled"  # options that do not describe a frozen text encoder
OPEN = {"transformers": ("length",)}  # options that a frozen kind leaves to the run
MOVED_TEXT_MODEL = "URL of a frozen text encoder, if it has moved since training"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, whose vectors the network attends to, and its tokenizer."""

    encoder: TextEncoderKind = option(
        "none",
        "text encoder; none: images without text; transformer: CLIP's, trained with the network; "
        "contrastive: that of a run with task=contrastive, frozen; transformers: CLIP or T5 in a "
        "folder of that library, or CLIP in one of open_clip, frozen",
        defines_run=True,
    )
    model: str = option(
        "",
        "frozen text encoder: folder or URL of its run or checkpoint, or a local folder that "
        "transformers or open_clip saved; a continued run may name another place of the same model",
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
    quick_gelu: bool = option(
        False,
        "transformer: CLIP's activation x sigmoid(1.702 x) in place of GELU",
        defines_run=True,
    )
    pooled: bool = option(
        True,
        "whether the vector of the whole text is added to the embedding of t; not in Stable "
        "Diffusion",
        defines_run=True,
    )

    @property
    def frozen(self) -> FrozenTextKind | None:
        """The kind of a text encoder that is trained elsewhere; None: ours, or none."""
        match self.encoder:
            case "none" | "transformer":
                return None
            case kind:
                return kind

    def problems(self, transformer_depth: int) -> Iterator[str]:
        """Yield a line for sizes that do not fit together, and for options without an encoder.

        `transformer_depth` is that of the network.
        """
        if self.encoder == "none" and transformer_depth:
            yield (
                f"model.transformer_depth is {transformer_depth}; a spatial transformer attends to "
                "a text: set text.encoder=transformer, or model.transformer_depth=0"
            )
        if self.width % self.heads:
            yield (f"text.width is {self.width}; it must be a multiple of text.heads {self.heads}")
        if self.frozen and not self.model:
            yield (
                f"text.model is empty; text.encoder={self.encoder} takes a text encoder that is "
                f"trained elsewhere: name it, as in text.model={FROZEN[self.frozen]}"
            )
        for item in fields(self):
            if (value := getattr(self, item.name)) == item.default or item.name == "encoder":
                continue
            given = f"text.{item.name} is {shown(value)}, which"
            if self.encoder == "none":
                yield (
                    f"{given} text.encoder=none does not read; leave it out, or set "
                    f"text.encoder={'contrastive' if item.name == 'model' else 'transformer'}"
                )
            elif self.encoder == "transformer" and item.name == "model":
                yield (
                    f"{given} text.encoder=transformer does not read: it is trained with the "
                    f"network; leave it out, or set text.encoder={' or '.join(FROZEN)}"
                )
            elif self.frozen and item.name not in (*OF_RUN, *OPEN.get(self.frozen, ())):
                yield f"{given} the model of text.model defines; leave it out"

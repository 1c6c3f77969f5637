"""Tokenizers: from texts to the tokens that a text encoder takes.

They are `tokenizer.json` files of the library `tokenizers` (the extra [text]), trained on the
captions of a data set or taken from another model. The file is data: it holds no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.config.text import FEWEST_TOKENS, SHORTEST_TEXT
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

START, END = "<|startoftext|>", "<|endoftext|>"  # those of CLIP
ENDS = (END, "</s>", "[SEP]", "<eos>")  # by other models
STARTS = (START, "<s>", "[CLS]", "<bos>")
PADS = ("<pad>", "[PAD]")  # a tokenizer without one fills with its end token, as CLIP does
BATCH = 10_000  # texts given to the trainer at once


class TokenizerError(RuntimeError):
    """A tokenizer that cannot be used; args are (where, problem, remedy)."""

    def __str__(self) -> str:
        where, problem, remedy = self.args
        return sanitize(f"{where}: {problem}; {remedy}")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer whose rows have `length` tokens: start, text, end, and then padding.

    Raises TokenizerError for a file that is no tokenizer or has no end token.
    """

    json: str  # the content of its tokenizer.json
    length: int  # L
    where: str = "the tokenizer"  # for errors
    pad: int | None = None  # token that fills rows; None: that of PADS, or the end token

    @classmethod
    def read(cls, url: str, length: int) -> Tokenizer:
        """Read the `tokenizer.json` at `url`, a file or a folder with one. Raises StorageError."""
        if not url.endswith(".json"):
            url = object_store.join(url, "tokenizer.json")
        data = object_store.read_bytes(url)
        try:
            return cls(data.decode(), length, url)
        except UnicodeDecodeError as error:
            raise TokenizerError(url, "it is not UTF-8", "name a tokenizer.json") from error

    @classmethod
    def trained(cls, texts: Iterable[str], vocabulary: int, length: int) -> Tokenizer:
        """Train byte-level BPE on `texts`, with at most `vocabulary` tokens.

        (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019, "Language models are
        unsupervised multitask learners", section 2.2.) Texts are lower-cased, as CLIP's are. Any
        text can be tokenized: each byte has a token. Raises ValueError for a vocabulary below
        FEWEST_TOKENS.
        """
        if vocabulary < FEWEST_TOKENS:
            raise ValueError(
                f"a vocabulary of {vocabulary} is too small: 256 bytes, the start and the end of a "
                f"text need {FEWEST_TOKENS}"
            )
        library = _library()
        made = library.Tokenizer(library.models.BPE())
        made.normalizer = library.normalizers.Sequence(
            [library.normalizers.NFC(), library.normalizers.Lowercase()]
        )
        # A leading space, so that a word is the same token wherever it stands.
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[START, END],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        made.train_from_iterator(_batches(texts), trainer)
        return cls(made.to_str(), length)

    def __post_init__(self) -> None:
        if self._held.end is None:
            raise TokenizerError(
                self.where,
                f"it has none of the end tokens {', '.join(ENDS)}",
                "name the tokenizer of a text encoder, or leave text.tokenizer empty to train one",
            )
        if self.length < SHORTEST_TEXT:
            raise ValueError(
                f"texts of {self.length} tokens hold no word between their start and their end: "
                f"set text.length to {SHORTEST_TEXT} or more"
            )

    @property
    def sha256(self) -> str:
        """sha256 of its file, and of its padding token if that is given; it identifies it."""
        padding = "" if self.pad is None else f"\n{self.pad}"
        return hashlib.sha256((self.json + padding).encode()).hexdigest()

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self._held.library.get_vocab_size(with_added_tokens=True))

    @property
    def end_token(self) -> int:
        """The token that ends each text."""
        assert self._held.end is not None  # checked when it was made
        return self._held.end

    @cached_property
    def null_tokens(self) -> tuple[int, ...]:
        """The row of the text ""."""
        return tuple(self._rows([""])[0])  # no tensor: a network may be built on the meta device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens of the texts, int64 [n, length]; longer texts are cut before the end token."""
        rows = self._rows(texts)
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.length)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The rows of `encode`."""
        held, rows = self._held, []
        for ids in self._ids(texts):
            start = [] if held.start is None else [held.start]
            row = [*start, *ids[: self.length - len(start) - 1], self.end_token]
            rows.append(row + [held.pad] * (self.length - len(row)))
        return rows

    def too_long(self, texts: Sequence[str]) -> list[tuple[str, int]]:
        """The texts that `encode` cuts, each with its number of tokens that do not fit."""
        room = self.length - 1 - (self._held.start is not None)
        counts = zip(texts, map(len, self._ids(texts)), strict=True)
        return [(text, count - room) for text, count in counts if count > room]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a row of tokens, without start, end and padding."""
        return str(self._held.library.decode(list(tokens), skip_special_tokens=True)).strip()

    @property
    def start_token(self) -> int | None:
        """The token that begins each text; None: there is none."""
        return self._held.start

    def padded_by(self, token: str) -> Tokenizer:
        """This tokenizer with rows that are filled by `token`. Raises TokenizerError."""
        number = self._held.library.token_to_id(token)
        if number is None:
            problem = f"it has no token {token!r}, by which its rows are filled"
            raise TokenizerError(self.where, problem, "name the files of one tokenizer")
        return self if number == self._held.pad else replace(self, pad=number)

    def for_transformers(self) -> dict[str, str]:
        """Its files by name, for transformers' AutoTokenizer: the rows of `encode`.

        Call it with padding="max_length" and truncation=True.
        """
        held, library = self._held, _library()
        names = {key: held.library.id_to_token(number) for key, number in held.special.items()}
        ends = [names[key] for key in ("bos_token", "eos_token") if key in names]
        single = " ".join([*ends[:-1], "$A", ends[-1]])
        whole = library.Tokenizer.from_str(held.library.to_str())
        whole.post_processor = library.processors.TemplateProcessing(
            single=single, special_tokens=[(name, whole.token_to_id(name)) for name in ends]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.length,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **names,
        }
        return {
            "tokenizer.json": whole.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        }

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without start and end."""
        found = self._held.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    @cached_property
    def _held(self) -> _Held:
        library = _library()
        try:
            made = library.Tokenizer.from_str(self.json)
        except Exception as error:
            problem = f"it is not a tokenizer ({' '.join(str(error).split())})"
            raise TokenizerError(self.where, problem, "name a tokenizer.json") from error
        made.no_padding()
        made.no_truncation()
        ids = made.get_vocab(with_added_tokens=True)
        start, end, pad = (
            next((ids[name] for name in names if name in ids), None)
            for names in (STARTS, ENDS, PADS)
        )
        pad = pad if self.pad is None else self.pad
        return _Held(made, start, end, end if pad is None else pad)

    def __getstate__(self) -> dict[str, Any]:
        """Its fields: the library's object is built anew in another process."""
        return {name: getattr(self, name) for name in ("json", "length", "where", "pad")}


@dataclass(frozen=True)
class _Held:
    """The library's object, and its special tokens; None: it has none."""

    library: Any
    start: int | None
    end: int | None
    pad: Any

    @property
    def special(self) -> dict[str, int]:
        """The special tokens that there are, as transformers calls them."""
        named = {"bos_token": self.start, "eos_token": self.end, "pad_token": self.pad}
        return {key: number for key, number in named.items() if number is not None}


def warn_of_cuts(tokenizer: Tokenizer, texts: Sequence[str], which: str) -> int:
    """The number of these texts that the tokenizer cuts; logs a warning if there are any.

    `which` names them, as in "3 prompts".
    """
    if cut := tokenizer.too_long(texts):
        longest, more = max(cut, key=lambda one: one[1])
        log.warning(
            "%s of %s have more than text.length=%d tokens and are cut; the longest has %d more "
            "(%.60s)",
            f"{len(cut):,}",
            which,
            tokenizer.length,
            more,
            longest,
        )
    return len(cut)


@lru_cache(maxsize=64)
def warn_of_cut_prompts(tokenizer: Tokenizer, prompts: tuple[str, ...]) -> None:
    """Log a warning if the tokenizer cuts any prompt, once for the same prompts."""
    warn_of_cuts(tokenizer, prompts, counted(len(prompts), "prompt"))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch = list[str]()
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def _library() -> Any:
    """The library `tokenizers`. Raises TokenizerError with the command that installs it."""
    try:
        import tokenizers
    except ImportError:
        remedy = "pip install 'ddpm-ray[text]'"
        raise TokenizerError("text", "the package tokenizers is not installed", remedy) from None
    return tokenizers

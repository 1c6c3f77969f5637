"""Tokenizers: rows of tokens, training, files of other models, refusals."""

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="needs the extra [text]")
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config.text import FEWEST_TOKENS
from ddpm_ray.data.tokenizer import END, START, Tokenizer, TokenizerError

CAPTIONS = ["a red apple", "a green apple", "a red pear on a table", "two green pears"] * 5
TOKENIZER = Tokenizer.trained(CAPTIONS, 300, 8)


@given(st.text(max_size=80))
def test_every_row_has_start_text_end_and_padding(text: str) -> None:
    """Any text gives one row of 8 tokens in 0..vocabulary-1, ended once and then filled."""
    (row,) = TOKENIZER.encode([text]).tolist()
    assert len(row) == 8
    assert 0 <= min(row) <= max(row) < TOKENIZER.vocabulary
    assert row[0] == 0
    assert set(row[row.index(TOKENIZER.end_token) :]) == {TOKENIZER.end_token}


@given(st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4))
def test_words_are_restored(texts: list[str]) -> None:
    """Decoding gives the lower-cased text back, whatever else is in the call."""
    long = Tokenizer(TOKENIZER.json, 40)
    rows = long.encode([text.upper() for text in texts]).tolist()
    assert [long.decode(row) for row in rows] == texts


def test_training_depends_on_the_texts_alone() -> None:
    """Another order and another process give the same file."""
    again = Tokenizer.trained(reversed(CAPTIONS), 300, 8)
    assert again.sha256 == TOKENIZER.sha256
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode(CAPTIONS).tolist() == TOKENIZER.encode(CAPTIONS).tolist()


def test_a_long_text_is_cut_before_its_end_and_counted() -> None:
    """16 letters without a merge are 17 tokens with the leading space, of which 6 fit."""
    text = "qzxjkvwyqzxjkvwy"
    (row,) = TOKENIZER.encode([text]).tolist()
    assert row[-1] == TOKENIZER.end_token
    assert TOKENIZER.end_token not in row[:-1]
    assert TOKENIZER.too_long(["a red apple", text]) == [(text, 17 - 6)]


def test_no_texts_give_no_rows() -> None:
    """The shape stays [0, L]."""
    assert TOKENIZER.encode([]).shape == (0, 8)


def test_the_rows_are_those_of_transformers_clip_tokenizer() -> None:
    """The same merges in transformers, with a start and padded with the end, give equal rows."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    import tokenizers

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(TOKENIZER.json),
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )
    texts = ["a red apple", "", "two green pears on a table and a red apple"]
    wrapped = [f"{START}{text}" for text in texts]
    found = theirs(wrapped, padding="max_length", max_length=8, truncation=True)["input_ids"]
    ours = TOKENIZER.encode(texts)
    for mine, other in zip(ours.tolist(), found, strict=True):
        assert mine[:-1] == other[:-1]


def test_a_tokenizer_with_other_special_tokens_is_read(tmp_path: Path) -> None:
    """One with </s> and <pad> and no start token, as T5's: rows end and are filled with them."""
    import tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "red": 2, "apple": 3, "<unk>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.read(str(tmp_path), 5)
    assert found.encode(["red apple", ""]).tolist() == [[2, 3, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert found.null_tokens == (1, 0, 0, 0, 0)


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    """Other JSON, bytes that are no text, and a tokenizer without an end."""
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: it is not a tokenizer \(.*name a"):
        Tokenizer.read(str(path), 8)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="it is not UTF-8"):
        Tokenizer.read(str(path), 8)
    endless = json.loads(TOKENIZER.json)
    endless["added_tokens"] = []
    endless["model"]["vocab"] = {
        f"~{name}" if name in (START, END) else name: number
        for name, number in endless["model"]["vocab"].items()
    }
    path.write_text(json.dumps(endless))
    with pytest.raises(TokenizerError, match="it has none of the end tokens"):
        Tokenizer.read(str(path), 8)


def test_impossible_sizes_are_refused() -> None:
    """A vocabulary without all bytes, and rows without a place for a word."""
    with pytest.raises(ValueError, match=f"a vocabulary of {FEWEST_TOKENS - 1} is too small"):
        Tokenizer.trained(CAPTIONS, FEWEST_TOKENS - 1, 8)
    with pytest.raises(ValueError, match=r"texts of 2 tokens hold no word"):
        Tokenizer(TOKENIZER.json, 2)

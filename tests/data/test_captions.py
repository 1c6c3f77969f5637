"""The rule of captions, their column in shards, and which of them a step uses."""

import pickle
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config import caption_rule
from ddpm_ray.config.caption_rule import CaptionError, cleaned
from ddpm_ray.counter_rng import Purpose, philox
from ddpm_ray.data import captions
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.caption_choice import choose
from ddpm_ray.data.captions import caption_column, caption_tuples

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=30)
SETS = st.lists(st.lists(TEXTS.map(cleaned).filter(bool), max_size=4), min_size=1, max_size=12)


@given(TEXTS)
def test_what_is_cleaned_is_in_nfc_and_stays_as_it_is(text: str) -> None:
    clean = cleaned(text)
    assert cleaned(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert clean == clean.strip()
    assert unicodedata.normalize("NFD", clean) == unicodedata.normalize("NFD", text.strip())


def problem_of(text: str) -> CaptionError | None:
    try:
        cleaned(text)
    except CaptionError as error:
        return error
    return None


@given(st.text())
def test_any_text_is_a_caption_or_has_a_problem_and_a_remedy(text: str) -> None:
    wrong = [c for c in text.strip() if unicodedata.category(c) in ("Cc", "Cs")]
    problem = problem_of(text)
    assert (problem is not None) == bool(wrong)
    if problem is not None:
        assert str(problem).isprintable()
        assert re.fullmatch("the caption h.*; .*", str(problem))
        assert str(pickle.loads(pickle.dumps(problem))) == str(problem)
        assert problem.kind.startswith("captions ")


@pytest.mark.parametrize(
    "text, problem, kind",
    [
        ("a" * 4097, "the caption has 4097 bytes of UTF-8; shorten it", caption_rule.TOO_LONG),
        ("\u20ac" * 1366, "the caption has 4098 bytes of UTF-8; shorten", caption_rule.TOO_LONG),
        ("a\u0301" * 10**6, "the caption has 3000000 bytes of UTF-8", caption_rule.TOO_LONG),
        ("\u1d160" * 1500, r"the caption has \d+ bytes of UTF-8", caption_rule.TOO_LONG),
        (
            "a\nb",
            r"holds the control character U\+000A; replace it by a space",
            caption_rule.CONTROL,
        ),
        ("a\tb", r"holds the control character U\+0009", caption_rule.CONTROL),
        ("a\x00", r"holds the control character U\+0000", caption_rule.CONTROL),
        ("a\x1b[2Jb", r"holds the control character U\+001B", caption_rule.CONTROL),
        ("a\x7fb", r"holds the control character U\+007F", caption_rule.CONTROL),
        ("a\x85b", r"holds the control character U\+0085", caption_rule.CONTROL),
        ("a\ud800", r"holds half a surrogate pair, U\+D800; write", caption_rule.NOT_UNICODE),
    ],
)
def test_what_no_caption_holds_is_named(text: str, problem: str, kind: str) -> None:
    with pytest.raises(CaptionError, match=problem) as refused:
        cleaned(text)
    assert refused.value.kind == kind


@pytest.mark.parametrize(
    "text, clean",
    [
        ("  a cat \n", "a cat"),
        (" \t\u3000\n", ""),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("a" * 4096, "a" * 4096),
        ("\u1112\u1161\u11ab" * 1365, "\ud55c" * 1365),  # 12,285 bytes become 4,095
        ("\U0001f9d1\U0001f3fd\u200d\U0001f52c", "\U0001f9d1\U0001f3fd\u200d\U0001f52c"),
    ],
    ids=range(6),
)
def test_a_caption_is_stripped_and_normalised(text: str, clean: str) -> None:
    assert cleaned(text) == clean


@given(SETS, st.data())
def test_a_column_gives_back_the_captions_of_any_rows(
    texts: list[list[str]], data: st.DataObject
) -> None:
    column = caption_column(texts)
    captions.require_captions(column)
    assert caption_tuples(column) == [tuple(one) for one in texts]
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1)))
    taken = column.take(pa.array(rows, pa.int64()))
    assert caption_tuples(taken) == [tuple(texts[row]) for row in rows]
    start = data.draw(st.integers(0, len(texts)))
    assert caption_tuples(column[start:]) == [tuple(one) for one in texts[start:]]
    sizes = [sum(len(text.encode()) for text in one) for one in texts[start:]]
    assert captions.caption_bytes(column[start:]).tolist() == sizes


@given(SETS, SETS)
def test_other_captions_have_another_digest(one: list[list[str]], two: list[list[str]]) -> None:
    equal = [tuple(texts) for texts in one] == [tuple(texts) for texts in two]
    digests = [
        captions.captions_digest(pa.array(texts, pa.large_list(pa.large_string())))
        for texts in (one, two)
    ]
    assert (digests[0] == digests[1]) == equal


@pytest.mark.parametrize(
    "texts, problem",
    [
        ([["a", None]], "it has null values in captions"),
        ([["a"] * 65], "a sample has 65 captions; at most 64 are allowed"),
        ([[""]], "a caption is empty"),
        ([["e\u0301"]], r"a caption is not in NFC, .* around it: 'e\\u0301'"),
        ([[" a"]], "a caption is not in NFC, or has white space around it: ' a'"),
        ([["a\u3000"]], r"a caption is not in NFC, or has white space around it: 'a\\u3000'"),
        ([["ok"], ["a\nb"]], r"a caption is invalid: .* control character U\+000A"),
        ([["\u00e9\x9b"]], r"a caption is invalid: .* control character U\+009B"),
        ([["a" * 4097]], "a caption is invalid: the caption has 4097 bytes"),
        ([["\u00e9" * 2049]], "a caption is invalid: the caption has 4098 bytes"),
    ],
    ids=range(10),
)
def test_a_column_that_packing_does_not_write_is_refused(texts: list[str], problem: str) -> None:
    with pytest.raises(ArrowFileError, match=problem) as refused:
        captions.require_captions(pa.array(texts, captions.COLUMN_TYPE))
    assert str(refused.value).isprintable()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), SETS, st.data())
def test_the_choice_does_not_depend_on_how_positions_are_divided(
    seed: int, step: int, texts: list[list[str]], data: st.DataObject
) -> None:
    positions = torch.arange(100, 100 + len(texts))
    whole = choose(texts, seed, step, positions)
    cut = data.draw(st.integers(0, len(texts)))
    parts = [
        choose(texts[here], seed, step, positions[here]) for here in (slice(cut), slice(cut, None))
    ]
    assert parts[0] + parts[1] == whole
    for chosen, those in zip(whole, texts, strict=True):
        assert chosen in those or (chosen == "" and not those)
    assert choose(texts, seed, torch.tensor(step), positions) == whole


def test_the_choice_follows_from_the_published_generator() -> None:
    """The first Philox word, scaled to the number of captions."""
    word, *_ = philox((0, 9, 4, int(Purpose.CAPTION)), 3)
    assert isinstance(word, int)
    assert choose([list("abcdefg")], 3, 4, torch.tensor([9])) == ["abcdefg"[word * 7 >> 32]]


def test_each_caption_is_as_likely_as_another_at_each_position() -> None:
    """Chi-square of 5 captions at 8 positions over 1,000 steps of a fixed seed."""
    texts = [list("abcde")] * 8
    steps = [choose(texts, 0, step, torch.arange(8)) for step in range(1000)]
    counts = np.array(
        [[column.count(text) for text in "abcde"] for column in zip(*steps, strict=True)]
    )
    assert scipy.stats.chisquare(counts.sum(0)).pvalue > 0.01
    assert scipy.stats.chi2_contingency(counts).pvalue > 0.01
    pairs = [steps[n][p] + steps[n + 1][p] for n in range(0, 1000, 2) for p in range(8)]
    table = [[pairs.count(a + b) for b in "abcde"] for a in "abcde"]
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01  # a step and the next

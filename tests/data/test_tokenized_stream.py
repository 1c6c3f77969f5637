"""Laws of the tokens in batches: one caption of each image, whatever the workers and the start."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.loader import Batch, ShardStream
from ddpm_ray.data.tokenized_stream import TokenizedStream
from ddpm_ray.data.tokenizer import Tokenizer
from tests.data.captioned_sets import write_captioned

BATCH = 6
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
CAPTIONS = [[f"{word} {n}" for n in range(at % 4)] for at, word in enumerate(WORDS)]
TOKENIZER = Tokenizer.trained([text for texts in CAPTIONS for text in texts], 300, 12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven samples with 0 to 3 captions each."""
    return write_captioned(tmp_path_factory.mktemp("captioned"), CAPTIONS, 3)


def opened(dataset: Dataset, positions: range) -> TokenizedStream:
    """The stream of these positions."""
    images = ShardStream(
        dataset,
        seed=3,
        global_batch_size=BATCH,
        positions=positions,
        lanes=2,
        window_samples=4,
    )
    return TokenizedStream(images, TOKENIZER, seed=3)


@given(first=st.integers(0, 20), workers=st.sampled_from([1, 2, 3]))
def test_tokens_depend_on_step_and_position_alone(
    dataset: Dataset, first: int, workers: int
) -> None:
    """Any number of workers that begin at any step read the tokens of one that read all before."""
    alone = opened(dataset, range(BATCH))
    wanted = alone.batch(first)
    share = BATCH // workers
    parts = []
    for worker in range(workers):
        stream = opened(dataset, range(worker * share, (worker + 1) * share))
        parts.append(stream.batch(first).tokens)
        stream.close()
    alone.close()
    assert wanted.tokens is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), wanted.tokens)


def test_each_image_has_one_of_its_own_captions(dataset: Dataset) -> None:
    """Over many steps each caption of a sample is drawn, and a sample without captions has ""."""
    stream, seen = opened(dataset, range(BATCH)), dict[int, set[str]]()
    for step in range(120):
        batch = stream.batch(step)
        assert batch.captions is None
        assert batch.tokens is not None
        for label, row in zip(batch.labels.tolist(), batch.tokens.tolist(), strict=True):
            seen.setdefault(label, set()).add(TOKENIZER.decode(row))
    stream.close()
    assert seen == {n: set(texts) or {""} for n, texts in enumerate(CAPTIONS)}


def test_tokens_are_put_into_memory_that_is_given(dataset: Dataset) -> None:
    """As images and labels are, so that a GPU reads them from pinned memory."""
    stream = opened(dataset, range(BATCH))
    memory = stream.batch(0).map(torch.clone)
    found = stream.batch(1, memory)
    assert isinstance(found, Batch)
    assert found.tokens is memory.tokens
    other = opened(dataset, range(BATCH))
    wanted = other.batch(1).tokens
    assert wanted is not None
    assert found.tokens is not None
    assert torch.equal(found.tokens, wanted)
    assert len(stream.keys(1)) == BATCH
    for one in (stream, other):
        one.close()


def test_a_set_without_any_caption_has_the_empty_text(tmp_path: Path) -> None:
    """For each image."""
    plain = write_captioned(tmp_path / "set", [[], [], []], 3)
    images = ShardStream(
        plain, seed=0, global_batch_size=2, positions=range(2), lanes=1, window_samples=4
    )
    tokens = TokenizedStream(images, TOKENIZER, 0).batch(0).tokens
    images.close()
    assert tokens is not None
    assert tokens.tolist() == [list(TOKENIZER.null_tokens)] * 2

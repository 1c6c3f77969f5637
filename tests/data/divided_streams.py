"""Streams of two workers that divide global batches of 12 at any position."""

from collections.abc import Iterator

from hypothesis import strategies as st

from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.loader import ShardStream


def divided_streams(dataset: Dataset, data: st.DataObject) -> Iterator[ShardStream]:
    cut = data.draw(st.integers(1, 11))
    window_samples = data.draw(st.sampled_from([1, 5, 1000]))
    for positions in (range(cut), range(cut, 12)):
        stream = ShardStream(
            dataset,
            seed=7,
            global_batch_size=12,
            positions=positions,
            lanes=3,
            window_samples=window_samples,
        )
        yield stream
        stream.close()

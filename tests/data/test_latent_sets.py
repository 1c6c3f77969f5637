"""Sets of latents and embeddings: exact statistics, what is delivered, hostile files refused."""

import dataclasses
import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ddpm_ray.data import arrow_io, embedding_sums, latent_sums, shard_index, shards
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.latent_sums import LatentSums
from ddpm_ray.data.loader import read_captions, read_images
from ddpm_ray.data.manifest import manifest_of
from ddpm_ray.data.shards import Latents, fetch_shard
from ddpm_ray.models import autoencoder
from tests.data.divided_streams import divided_streams
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import random_latents, write_latents

FLOAT16 = arrays.from_dtype(np.dtype(np.float16), allow_nan=False, allow_infinity=False)


def test_the_range_of_log_variances_is_that_of_the_network() -> None:
    assert latent_sums.LOG_VARIANCES == autoencoder.LOG_VARIANCES


@given(arrays.arrays(np.float16, (4, 2, 3, 2, 1), elements=FLOAT16))
def test_sums_of_means_are_those_of_exact_fractions(mean: Any) -> None:
    """Any float16 counts: subnormal ones, 65504, -0."""
    sums = latent_sums.latent_sums(mean, np.zeros_like(mean))
    for c in range(3):
        values = [Fraction(float(value)) for value in mean[:, :, c].ravel()]
        assert Fraction(sums.mean_sum[c], 2**24) == sum(values)
        assert Fraction(sums.mean_sum_of_squares[c], 2**48) == sum(v**2 for v in values)
    assert sums.variance_sum == [16 * 2**48] * 3  # exp(0) = 1


@given(arrays.arrays(np.float16, st.tuples(st.integers(1, 9), st.just(3)), elements=FLOAT16))
def test_sums_of_embeddings_are_those_of_exact_fractions(embeddings: Any) -> None:
    sums = embedding_sums.embedding_sums(embeddings)
    for e in range(3):
        values = [Fraction(float(value)) for value in embeddings[:, e]]
        assert Fraction(sums.embedding_sum[e], 2**24) == sum(values)
        assert Fraction(sums.embedding_sum_of_squares[e], 2**48) == sum(v**2 for v in values)


def test_sums_of_many_embeddings_do_not_overflow() -> None:
    """Two and a half parts of the largest value, and of the smallest."""
    count = 5 * 2**15
    ends = np.array([65504, -65504, 2**-24], np.float16)
    sums = embedding_sums.embedding_sums(np.broadcast_to(ends, (count, 3)))
    units = [65504 << 24, -65504 << 24, 1]
    assert sums == ([count * one for one in units], [count * one**2 for one in units])
    assert all(type(one) is int for part in sums for one in part)
    mean, variance = embedding_sums.embedding_mean_and_variance(sums, count)
    assert (mean, variance) == ((65504, -65504, 2**-24), (0, 0, 0))


def test_variances_are_exp_to_the_nearest_unit() -> None:
    """mpmath's exp at 60 digits, for every 97th float16 of the range."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    low, high = latent_sums.LOG_VARIANCES
    with np.errstate(invalid="ignore"):
        every = every[(every >= low) & (every <= high)][::97]
    assert len(every) > 300
    with mpmath.workdps(60):
        for value in every:
            one = np.full((1, 1, 1, 1, 1), value)
            (found,) = latent_sums.latent_sums(np.zeros_like(one), one).variance_sum
            assert abs(found - mpmath.exp(float(value)) * 2**48) <= 0.5


def test_statistics_do_not_depend_on_how_samples_are_divided_into_shards(tmp_path: Path) -> None:
    latents = random_latents(23)
    one, many = (
        write_latents(tmp_path / name, latents, size).manifest
        for name, size in (("one", 23), ("many", 4))
    )
    assert (one.latent_mean, one.latent_std) == (many.latent_mean, many.latent_std)
    mean, log_variance = (half.astype(np.float64) for half in latents)
    variance = mean.var((0, 1, 3, 4)) + np.exp(log_variance).mean((0, 1, 3, 4))
    assert one.latent_mean == pytest.approx(mean.mean((0, 1, 3, 4)), rel=1e-12)
    assert one.latent_std == pytest.approx(np.sqrt(variance), rel=1e-12)


def test_statistics_of_embeddings_are_numpy_s_for_any_division(tmp_path: Path) -> None:
    embeddings = random_embeddings(23)
    one, many = (
        write_embeddings(tmp_path / name, embeddings, size).manifest
        for name, size in (("one", 23), ("many", 4))
    )
    assert (one.embedding_mean, one.embedding_std) == (many.embedding_mean, many.embedding_std)
    wide = embeddings.astype(np.float64)
    assert one.embedding_mean == pytest.approx(wide.mean(0), rel=1e-12)
    assert one.embedding_std == pytest.approx(wide.std(0), rel=1e-12)


def test_a_set_of_embeddings_opens_as_it_was_written(tmp_path: Path) -> None:
    embeddings = random_embeddings(10)
    written = write_embeddings(tmp_path, embeddings, 4, captioned=True)
    opened = open_dataset(written.url)
    assert opened.manifest == written.manifest
    assert opened.fingerprint == written.fingerprint
    assert opened.recipe == written.recipe
    manifest = opened.manifest
    assert (manifest.format, manifest.codec) == ("ddpm-ray shards 2", "embeddings")
    assert manifest.sample_shape == (5,)
    assert manifest.sample_dtype == np.float16
    assert (manifest.sample_bytes, manifest.diffused_shape) == (10, (1, 1, 5))
    assert list(read_captions(opened, range(3))) == [(str(n),) for n in range(10)]
    table = pa.ipc.open_file(tmp_path / "shard-00001.arrow").read_all()
    assert table.column_names == ["embedding", "label", "key", "captions"]
    assert table.schema.field("embedding").type == pa.fixed_shape_tensor(pa.float16(), [5])
    assert (table.column("embedding").chunk(0).to_numpy_ndarray() == embeddings[4:8]).all()


def test_a_set_opens_as_it_was_written(tmp_path: Path) -> None:
    latents = random_latents(10)
    written = write_latents(tmp_path / "set", latents, 4)
    opened = open_dataset(written.url)
    assert opened.manifest == written.manifest
    assert opened.fingerprint == written.fingerprint
    assert opened.recipe == written.recipe
    assert opened.manifest.format == "ddpm-ray shards 2"
    assert opened.manifest.sample_bytes == 2 * 2 * 3 * 2 * 4 * 2  # halves, views, c, h, w, bytes
    shard = fetch_shard(opened, 1)
    assert isinstance(shard.images, Latents)
    assert np.array_equal(shard.images.mean, latents.mean[4:8])
    assert np.array_equal(shard.images.log_variance, latents.log_variance[4:8])
    assert shard.keys.to_pylist() == ["n-4", "n-5", "n-6", "n-7"]


def test_arrow_alone_reads_a_shard(tmp_path: Path) -> None:
    latents = random_latents(3)
    write_latents(tmp_path, latents, 3)
    table = pa.ipc.open_file(tmp_path / "shard-00000.arrow").read_all()
    assert table.column_names == ["mean", "logvar", "label", "key"]
    assert table.schema.field("mean").type == pa.fixed_shape_tensor(pa.float16(), [2, 3, 2, 4])
    assert (table.column("logvar").chunk(0).to_numpy_ndarray() == latents.log_variance).all()


@settings(max_examples=10)
@given(st.data())
def test_any_division_of_a_batch_delivers_the_stored_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    samples, seed = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 99))
    folder, shard_samples = tmp_path_factory.mktemp("set"), data.draw(st.integers(1, 9))
    if data.draw(st.booleans()):
        latents = random_latents(samples, seed=seed)
        dataset = write_latents(folder, latents, shard_samples)
        stored = torch.from_numpy(np.stack(latents, axis=1))  # [n, 2, views, c, h, w]
    else:
        embeddings = random_embeddings(samples, seed=seed)
        dataset = write_embeddings(folder, embeddings, shard_samples)
        stored = torch.from_numpy(embeddings)  # [n, E]
    for stream in divided_streams(dataset, data):
        for step in range(3):
            batch = stream.batch(step)
            numbers = [int(key.removeprefix("n-")) for key in stream.keys(step)]
            assert batch.images.dtype == torch.float16
            assert torch.equal(batch.images, stored[numbers])
            assert batch.labels.tolist() == [n % 7 for n in numbers]


def test_read_images_gives_the_packed_order(tmp_path: Path) -> None:
    latents = random_latents(10)
    dataset = write_latents(tmp_path, latents, 4)
    found = torch.cat([batch.images for batch in read_images(dataset, range(3))])
    assert torch.equal(found, torch.from_numpy(np.stack(latents, axis=1)))
    embeddings = random_embeddings(10)
    dataset = write_embeddings(tmp_path / "embeddings", embeddings, 4)
    found = torch.cat([batch.images for batch in read_images(dataset, range(3))])
    assert torch.equal(found, torch.from_numpy(embeddings))


def four(kind: str, folder: Path) -> Dataset:
    """Four samples in one shard."""
    if kind == "latents":
        return write_latents(folder, random_latents(4), 4)
    return write_embeddings(folder, random_embeddings(4), 4)


def of(kind: str, *rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Rows of a test's table that are of one kind of set."""
    return [(kind, *row) for row in rows]


def republish(folder: Path, recipe: dict[str, Any], row: dict[str, Any]) -> str:
    """Give the set in `folder` the index of `recipe` and `row`, with consistent hashes."""
    latent = "mean_sum" in row
    columns = shard_index.LATENT_SCHEMA if latent else shard_index.EMBEDDING_SCHEMA
    schema = columns.with_metadata({"recipe": json.dumps(recipe)})
    index = arrow_io.serialize_table(pa.Table.from_pylist([row], schema=schema))
    (folder / "index.arrow").write_bytes(index)
    manifest = {"format": "ddpm-ray shards 2", "index_sha256": hashlib.sha256(index).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize(
    "kind, changes, problem",
    of(
        "latents",
        ({"latent_shape": [3, 2, 5]}, r"latent_shape is \[3, 2, 5\] for image_shape \[4, 8, 1\]"),
        ({"latent_shape": [3, 0, 4]}, r"latent_shape is \[3, 0, 4\] for"),
        ({"latent_shape": [3, -2, -4]}, r"latent_shape is \[3, -2, -4\] for"),
        ({"latent_shape": [10**9, 2, 4]}, r"latent_shape is \[1000000000, 2, 4\] for"),
        ({"latent_shape": [2, 2, 4]}, "mean_sum does not have 2 numbers for each shard"),
        ({"latent_shape": "324"}, "latent_shape is '324'; it must be three whole numbers"),
        ({"latent_shape": [3.0, 2, 4]}, "latent_shape is .*; it must be three whole numbers"),
        ({"latent_shape": None}, "latent_shape is None; it must be three whole numbers"),
        ({"views": ["flipped"]}, "views is .*'flipped'.; it must be one of"),
        ({"views": 3}, "views is 3; it must be one of"),
        ({"autoencoder_sha256": "../../x"}, "autoencoder_sha256 is '../../x'; it must be a sha256"),
        ({"autoencoder_sha256": "a" * 64 + "\n"}, r"autoencoder_sha256 is 'a*\\n'; it must be"),
        ({"autoencoder_sha256": None}, "autoencoder_sha256 is None; it must be a sha256"),
        ({"codec": "pixels"}, "its columns are not those of the codec pixels"),
        ({"codec": "embeddings"}, "its columns are not those of the codec embeddings"),
        ({"codec": ["latents"]}, r"codec is \['latents'\]; it must be a string"),
        ({"image_shape": [0, 0, 1]}, r"image_shape is \[0, 0, 1\]"),
    )
    + of(
        "embeddings",
        ({"embedding_width": 4}, "embedding_sum does not have 4 numbers for each shard"),
        ({"embedding_width": 0}, "embedding_width is 0; it must be a whole number in 1..65536"),
        ({"embedding_width": 2**16 + 1}, "embedding_width is 65537; it must be a whole"),
        ({"embedding_width": True}, "embedding_width is True; it must be a whole"),
        ({"embedding_width": 5.0}, "embedding_width is 5.0; it must be a whole"),
        ({"embedding_width": None}, "embedding_width is None; it must be a whole"),
        ({"encoder_sha256": "../../x"}, "encoder_sha256 is '../../x'; it must be a sha256 in hex"),
        ({"encoder_sha256": None}, "encoder_sha256 is None; it must be a sha256 in hex"),
        ({"codec": "latents"}, "its columns are not those of the codec latents"),
        ({"image_shape": [0, 0, 1]}, r"image_shape is \[0, 0, 1\]"),
    ),
)
def test_a_recipe_of_no_such_set_is_refused(
    kind: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    dataset = four(kind, tmp_path)
    (row,) = dataset.index.to_pylist()
    url = republish(tmp_path, dataset.recipe.to_json() | changes, row)
    with pytest.raises(DatasetError, match=rf"index.arrow: {problem}.*again") as refused:
        open_dataset(url)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "kind, changes, problem",
    of(
        "latents",
        ({"mean_sum": [1, 2]}, "mean_sum does not have 3 numbers for each shard"),
        ({"mean_sum": [1, 2, None]}, "mean_sum does not have 3 numbers for each shard"),
        ({"variance_sum": [0, 0, 0]}, "sums of latents are .* for 64 values"),
        ({"variance_sum": [-(10**30)] * 3}, "sums of latents are .* for 64 values"),
        ({"mean_sum": [10**37] * 3}, "sums of latents are .* for 64 values"),
        ({"mean_sum_of_squares": [-1, -1, -1]}, "sums of latents are .* for 64 values"),
        ({"name": "../../secret"}, "name is '../../secret'; it must match"),
    )
    + of(
        "embeddings",
        ({"embedding_sum": [1] * 4}, "embedding_sum does not have 5 numbers for each shard"),
        ({"embedding_sum": [1] * 4 + [None]}, "embedding_sum does not have 5 numbers for each"),
        ({"embedding_sum": [10**37] * 5}, "sums of embeddings are .* for 4 values"),
        ({"embedding_sum_of_squares": [-1] * 5}, "sums of embeddings are .* for 4 values"),
    ),
)
def test_sums_that_no_samples_have_are_refused(
    kind: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    dataset = four(kind, tmp_path)
    (row,) = dataset.index.to_pylist()
    url = republish(tmp_path, dataset.recipe.to_json(), row | changes)
    with pytest.raises(DatasetError, match=rf"index.arrow: {problem}.*; pack the data set again"):
        open_dataset(url)


@pytest.mark.parametrize(
    "kind, field, value",
    of(
        "latents",
        ("latent_std", [1.0, 1.0, 1.0]),
        ("latent_mean", [0.0, 0.0, 0.0]),
        ("autoencoder_sha256", "b" * 64),
        ("views", ["plain"]),
        ("codec", "pixels"),
        ("format", "ddpm-ray shards 1"),
    )
    + of(
        "embeddings",
        ("embedding_std", [1.0] * 5),
        ("embedding_mean", [0.0] * 5),
        ("embedding_width", 4),
        ("encoder_sha256", "a" * 64),
        ("codec", "latents"),
        ("latent_mean", []),
        ("format", "ddpm-ray shards 1"),
    ),
)
def test_an_edited_manifest_is_refused(
    kind: str, field: str, value: object, tmp_path: Path
) -> None:
    four(kind, tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DatasetError, match=f"manifest.json: {field} is .*, but by the index it is"):
        open_dataset(str(tmp_path))


def damaged(value: float, half: str) -> bytes:
    """A shard of `random_latents(4)` with one other value."""
    latents = random_latents(4)
    getattr(latents, half)[2, 1, 0, 1, 3] = value
    return shards.shard_bytes(latents, [0] * 4, list("abcd"))


def damaged_embedding(value: float) -> bytes:
    """A shard of `random_embeddings(4)` with one other value."""
    embeddings = random_embeddings(4)
    embeddings[2, 1] = value
    return shards.shard_bytes(embeddings, [0] * 4, list("abcd"))


@pytest.mark.parametrize(
    "kind, data, problem",
    of(
        "latents",
        (damaged(math.nan, "mean"), "a value of mean is not finite"),
        (damaged(math.inf, "mean"), "a value of mean is not finite"),
        (damaged(math.nan, "log_variance"), "a value of logvar is not in -30..20"),
        (damaged(20.02, "log_variance"), "a value of logvar is not in -30..20"),
        (damaged(-30.02, "log_variance"), "a value of logvar is not in -30..20"),
        (
            shards.shard_bytes(random_latents(4, views=1), [0] * 4, list("abcd")),
            r"its columns are mean .*shape=\[1,3,2,4\]",
        ),
        (
            shards.shard_bytes(np.zeros((4, 4, 8, 1), np.uint8), [0] * 4, list("abcd")),
            "its columns are image",
        ),
        (damaged_embedding(0.5), "its columns are embedding"),
    )
    + of(
        "embeddings",
        (damaged_embedding(math.nan), "a value of embedding is not finite"),
        (damaged_embedding(-math.inf), "a value of embedding is not finite"),
        (damaged(0.5, "mean"), "its columns are mean"),
        (
            shards.shard_bytes(random_embeddings(4, width=4), [0] * 4, list("abcd")),
            r"its columns are embedding .*shape=\[4\]",
        ),
        (
            shards.shard_bytes(random_embeddings(3), [0] * 3, list("abc")),
            r"its bytes and samples are \(\d+, 3\), the index says \(\d+, 4\)",
        ),
        (
            shards.shard_bytes(np.zeros((4, 5), np.uint8), [0] * 4, list("abcd")),
            "its columns are image",
        ),
    ),
)
def test_a_shard_of_other_values_is_refused(
    kind: str, data: bytes, problem: str, tmp_path: Path
) -> None:
    """Its hash is right: whoever made the set wrote it."""
    dataset = four(kind, tmp_path)
    (row,) = dataset.index.to_pylist()
    row |= {"stored_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    index = shard_index.serialize_index(dataset.recipe.to_json(), [row])
    table = shard_index.parse_index(index)
    changed = dataclasses.replace(dataset, manifest=manifest_of(table, ""), index=table)
    (tmp_path / "shard-00000.arrow").write_bytes(data)
    with pytest.raises(DatasetError, match=f"shard-00000.arrow: not a shard: {problem}"):
        fetch_shard(changed, 0)


def test_the_largest_shard_has_sums_that_the_index_can_hold() -> None:
    """2^29 float16 values of 65504 and exp(20), the most that 2^30 bytes hold, twice over."""
    count = 2**30
    square, spread = (65504 << 24) ** 2, math.ceil(math.exp(20) * 2**48)
    sums = LatentSums([count * (65504 << 24)], [count * square], [count * spread])
    held = pa.array([sums.mean_sum_of_squares, sums.variance_sum], pa.list_(pa.decimal128(38, 0)))
    assert held.to_pylist()[0] == [count * square]
    mean, variance = latent_sums.mean_and_variance(sums, count)
    assert mean[0] == 65504
    assert variance[0] == pytest.approx(math.exp(20), rel=1e-12)

"""Built-in data sets: digits, mnist, fashion-mnist and cifar10."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ddpm_ray.config.jobs.pack import Split
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.redaction import counted
from ddpm_ray.storage import checksummed, object_store

BuiltIn = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
NAMES: tuple[str, ...] = get_args(BuiltIn)
DOWNLOADS = "~/.cache/ddpm-ray/downloads"


class Arrays(NamedTuple):
    """A complete data set in memory."""

    images: npt.NDArray[np.uint8]  # [N, H, W, C]
    labels: npt.NDArray[np.int64]  # [N]
    label_names: tuple[str, ...]


# Addresses and hashes are those of tensorflow/datasets (tensorflow_datasets/url_checksums).
URLS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
}
SHA256 = {  # of the images file and the labels file; of the archive
    ("mnist", "train"): (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    ("mnist", "test"): (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    ("fashion-mnist", "train"): (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    ("fashion-mnist", "test"): (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    ("cifar10", "train"): ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",),
    ("cifar10", "test"): ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",),
}
SOURCE_SHA256 = {  # Source.digest of the sets that training packs itself, as in their manifests
    "digits": "d738977514bfa44bb4552aca2d07d68da3a0530c35aafa4b46d71f4df18824f0",
}
FASHION_LABELS: tuple[str, ...] = ("t-shirt", "trouser", "pullover", "dress", "coat")
FASHION_LABELS += ("sandal", "shirt", "sneaker", "bag", "boot")
CIFAR10_LABELS: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_LABELS += ("dog", "frog", "horse", "ship", "truck")


def load_arrays(name: BuiltIn, split: Split, url: str = "", sha256: Sequence[str] = ()) -> Arrays:
    """Load the data set `name` from `url`, by default its public address.

    For mnist and fashion-mnist `url` is the folder of the .gz files, and `sha256` holds the hashes
    of the images and the labels; for cifar10 both refer to the archive. Raises StorageError if a
    file cannot be read or has another hash, DatasetError if its contents are invalid.
    """
    if name == "digits":
        return _digits()
    address, hashes = url or URLS[name], tuple(sha256) or SHA256[name, split]
    if len(hashes) != len(SHA256[name, split]):
        wanted = counted(len(SHA256[name, split]), "file")
        problem = f"sha256 has {counted(len(hashes), 'hash', 'hashes')} for {wanted}"
        raise DatasetError(name, problem, "give one for each file, or none for the published ones")
    if name == "cifar10":
        return _cifar10(address, split, hashes[0])
    prefix = "train" if split == "train" else "t10k"
    files = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    images, labels = (
        _idx(object_store.join(address, file), sha) for file, sha in zip(files, hashes, strict=True)
    )
    label_names = FASHION_LABELS if name == "fashion-mnist" else tuple("0123456789")
    return Arrays(images[..., None], labels.astype(np.int64), label_names)


def _digits() -> Arrays:
    """1,797 scans of 8 x 8 pixels from scikit-learn (Alpaydin and Kaynak 1998, UCI)."""
    try:
        from sklearn.datasets import load_digits  # optional dependency
    except ImportError as error:
        problem = "this data set is part of scikit-learn, which is not installed"
        raise DatasetError("digits", problem, "pip install 'ddpm-ray[digits]'") from error
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # from 0..16
    return Arrays(images, bunch.target.astype(np.int64), tuple("0123456789"))


def _idx(url: str, sha256: str) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file: two zero bytes, type 8 (uint8), rank, sizes, data."""
    data = gzip.decompress(checksummed.fetch(url, sha256, DOWNLOADS).read_bytes())
    rank = data[3] if data[:3] == b"\x00\x00\x08" else 0
    shape = np.frombuffer(data, ">u4", rank, offset=4).astype(int) if rank else np.zeros(0, int)
    if rank not in (1, 3) or len(data) != 4 + 4 * rank + shape.prod():
        raise DatasetError(url, "not a complete IDX file of uint8", "download the original file")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _cifar10(url: str, split: Split, sha256: str) -> Arrays:
    """Read the official binary archive: records of a label byte and 3 x 32 x 32 pixels."""
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else ["test_batch.bin"]
    data = checksummed.fetch(url, sha256, DOWNLOADS).read_bytes()
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
            records = np.frombuffer(b"".join(file.read() for file in files if file), np.uint8)
        records = records.reshape(-1, 1 + 3 * 32 * 32)
    except (tarfile.TarError, KeyError, ValueError) as error:
        problem = f"not the binary archive of CIFAR-10 ({error})"
        raise DatasetError(url, problem, "download cifar-10-binary.tar.gz") from error
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(images, records[:, 0].astype(np.int64), CIFAR10_LABELS)

"""Weights for Inception from a file: the release file of pytorch-fid, or a folded npz.

Release file: `<layer>.conv.weight`, `<layer>.bn.weight`, `.bias`, `.running_mean`, `.running_var`.
Folded npz: `<layer>.weight`, `<layer>.bias`. Layers behind the widest features asked for may
be missing, and so may `fc.weight`, the classes; whatever else a file holds is not read.
"""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.config.evaluation import InceptionResize
from ddpm_ray.evaluation.features.inception import Inception

NORM_EPS = 1e-3  # of the graph's batch norms
CLASSES = 1008  # of the graph


class InceptionWeightsError(ValueError):
    """A file that Inception cannot be read from; args are (path, problem)."""

    def __str__(self) -> str:
        path, problem = self.args
        return (
            f"{path}: {problem}; expected pytorch-fid's pt_inception-2015-12-05-6726825d.pth "
            "or an npz of its folded layers"
        )


def load_inception(
    path: str | Path, widths: Iterable[int] = (2048,), resize: InceptionResize = "original"
) -> Inception:
    """The network with the weights of the local file `path`, on the CPU, ready to run.

    Raises InceptionWeightsError, one line, where the file is no such file or lacks a layer that
    `widths` need. No code in the file is run: torch.load with weights_only, npz without pickle.
    """
    with torch.device("meta"):
        network = Inception(widths, resize)
    stored = _tensors(Path(path))
    folded = {}
    for name, expected in network.layers.state_dict().items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.conv.weight" in stored:
            tensor = _folded(stored, layer, str(path))[part]
        elif name in stored:
            tensor = stored[name]
        else:
            raise InceptionWeightsError(str(path), f"it has no {name}")
        if tensor.shape != expected.shape:
            raise InceptionWeightsError(
                str(path), f"{name} is {list(tensor.shape)}, it must be {list(expected.shape)}"
            )
        layout = torch.channels_last if part == "weight" else torch.contiguous_format
        folded[name] = tensor.float().contiguous(memory_format=layout)
    network.layers.load_state_dict(folded, assign=True)
    if 2048 in network.widths and (weight := stored.get("fc.weight")) is not None:
        if weight.shape != (CLASSES, 2048):  # torchvision's network has 1000, and other weights
            raise InceptionWeightsError(
                str(path), f"fc.weight is {list(weight.shape)}, it must be {[CLASSES, 2048]}"
            )
        network.class_weight = weight.float()
    return network.requires_grad_(False)


def _folded(stored: dict[str, Tensor], layer: str, path: str) -> dict[str, Tensor]:
    """Weight and bias of convolution and batch norm in one, computed in float64."""
    try:
        kernel = stored[f"{layer}.conv.weight"].double()
        scale, shift, mean, variance = (
            stored[f"{layer}.bn.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
    except KeyError as error:
        raise InceptionWeightsError(path, f"it has no {error.args[0]}") from error
    gain = scale / torch.sqrt(variance + NORM_EPS)
    return {"weight": kernel * gain.view(-1, 1, 1, 1), "bias": shift - mean * gain}


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file by name; the format is recognised by content, not by suffix."""
    try:
        if zipfile.is_zipfile(path) and any(
            name.endswith(".npy") for name in zipfile.ZipFile(path).namelist()
        ):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InceptionWeightsError(str(path), f"it cannot be read: {reason}") from error
    if not isinstance(stored, dict):
        raise InceptionWeightsError(str(path), f"it holds a {type(stored).__name__}, not weights")
    return stored

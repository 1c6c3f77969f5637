"""Text encoders in folders of transformers: its own outputs, and what is no text encoder."""

import importlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")

from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.transformers_text import text_folder
from tests.models.transformers_folders import KINDS, L, read_tokenizer, write_folder

TEXTS = ["a cat", "", "A Cat, a dog; a bird and a fish", "fish"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its tokens and its mask, and without a network; the mean of T5 is over each text."""
    folder, transformers = folders[kind], importlib.import_module("transformers")
    tokenizer = read_tokenizer(folder)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    rows = theirs(TEXTS, padding="max_length", truncation=True, max_length=L, return_tensors="pt")
    assert torch.equal(tokenizer.encode(TEXTS), rows.input_ids)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    monkeypatch.delattr(socket, "socket")
    found = text_folder(str(folder))
    found.require_tokens(tokenizer.end_token, tokenizer.vocabulary, L)
    with torch.no_grad():
        states, pooled = found.load(tokenizer.end_token)(rows.input_ids)
        wanted, whole = outputs(model, kind, rows)
    torch.testing.assert_close(states, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, whole, rtol=1e-5, atol=1e-5)
    assert (found.width, found.pooled_width) == (states.shape[2], pooled.shape[1])
    assert states.std() > 0.1


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device: a tensor as a number or a truth value of Python."""

    def __torch_dispatch__(
        self, of: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if of is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("Python asks for a number of a tensor")
        return of(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_does_not_wait_for_the_device(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = read_tokenizer(folders[kind])
    network = text_folder(str(folders[kind])).load(tokenizer.end_token).eval()
    rows = tokenizer.encode(TEXTS)
    with torch.no_grad(), NoWaiting():
        assert network(rows).states.shape[:2] == rows.shape
        with pytest.raises(AssertionError, match="Python asks for a number"):
            bool(rows.all())


def outputs(model: Any, kind: str, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and the vector of the whole text, as transformers computes them."""
    if kind.startswith("T5"):
        encoder, mask = (model if kind == "T5EncoderModel" else model.encoder), rows.attention_mask
        assert 0 < mask.sum() < mask.numel()
        states = encoder(rows.input_ids, attention_mask=mask).last_hidden_state
        counts = mask.sum(1).tolist()
        return states, torch.stack([one[:n].mean(0) for one, n in zip(states, counts, strict=True)])
    found = (model.text_model if kind == "CLIPModel" else model)(rows.input_ids)
    if kind == "CLIPModel":
        return found.last_hidden_state, model.text_projection(found.pooler_output)
    projects = kind == "CLIPTextModelWithProjection"
    return found.last_hidden_state, found.text_embeds if projects else found.pooler_output


def test_weights_in_several_files_are_read_and_every_file_counts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A change of any file is another model."""
    transformers: Any = importlib.import_module("transformers")
    whole = text_folder(str(folders["T5EncoderModel"]))
    shutil.copytree(whole.path, tmp_path / "parts")
    (tmp_path / "parts/model.safetensors").unlink()
    model = transformers.T5EncoderModel.from_pretrained(whole.path)
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    parts = text_folder(str(tmp_path / "parts"))
    assert len(parts.files) > 4
    rows = read_tokenizer(whole.path).encode(TEXTS)
    end = read_tokenizer(whole.path).end_token
    assert torch.equal(whole.load(end)(rows).states, parts.load(end)(rows).states)
    seen = {whole.sha256(), parts.sha256()}
    for name in parts.files:
        file = tmp_path / "parts" / name
        file.write_bytes(file.read_bytes() + b" ")
        seen.add(parts.sha256())
    assert len(seen) == len(parts.files) + 2
    index = tmp_path / "parts/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UnsupportedModelError, match="names no files of this folder"):
        text_folder(str(tmp_path / "parts"))


def with_config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, says",
    [
        (shutil.rmtree, "there is no such folder on this machine; name a local folder of transf"),
        (without("config.json"), "there is no config.json in this folder"),
        (without("tokenizer.json"), "there is no tokenizer.json in this folder"),
        (as_bin, "there is no model.safetensors in this folder; save the model with safe_serial"),
        (with_config(architectures=["BertModel"]), "holds 'BertModel'; text encoders are CLIPTex"),
        (with_config(architectures=None), "holds None; text encoders are CLIPTextModel"),
        (with_config(architectures=[["CLIPTextModel"]]), r"holds \['CLIPTextModel'\]; text enc"),
        (with_config(quantization_config={}), "is quantized; save it in float32 or bfloat16"),
        (with_config(hidden_size="x"), r"config.json: cannot be read: "),
        (with_config(eos_token_id=[2]), r"config.json: cannot be read: eos_token_id is \[2\], and"),
        (with_config(eos_token_id=None), r"config.json: cannot be read: eos_token_id is None, and"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter of another mo"),
    ],
)
def test_what_is_no_text_encoder_is_refused(
    change: Callable[[Path], object], says: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders["CLIPTextModel"], folder)
    change(folder)
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        text_folder(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fault", ["damaged", "lacking"])
def test_weights_that_cannot_be_used_are_refused(
    fault: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders["CLIPTextModel"], folder)
    weights, says = folder / "model.safetensors", "cannot be read: "
    if fault == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        tensors = load_file(weights)
        name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
        del tensors[name]
        save_file(tensors, weights, {"format": "pt"})
        says = "its weights lack 1 tensor, the first is .*final_layer_norm.weight"
    with pytest.raises(UnsupportedModelError, match=says):
        text_folder(str(folder)).load(1)


@pytest.mark.parametrize(
    "change, tokens, says",
    [
        (with_config(), (1, 999, L), "tokenizer.json has 999 tokens, and config.json 2.."),
        (with_config(), (1, 9, L + 1), "text.length is 9, and its texts have at most 8 tokens"),
        (with_config(), (0, 9, L), "its eos_token_id is 1, and tokenizer.json ends texts with tok"),
        (with_config(eos_token_id=2), (1, 9, L), "takes the last token of its vocabulary as the"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    change: Callable[[Path], object],
    tokens: tuple[int, int, int],
    says: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders["CLIPTextModel"], folder)
    change(folder)
    found = text_folder(str(folder))
    with pytest.raises(UnsupportedModelError, match=says):
        found.require_tokens(*tokens)
    if "last token" in says:
        found.require_tokens(8, 9, L)

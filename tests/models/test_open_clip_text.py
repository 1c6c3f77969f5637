"""Text encoders in folders of open_clip: its own outputs, recorded, and what is no such folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")

from ddpm_ray.assembly.frozen_text import frozen_text_folder, text_model
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from tests.golden import make_open_clip_text as golden
from tests.models.transformers_folders import write_folder

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write(folder: Path, form: str, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """A folder as open_clip saves it; with a prefix, as it names the tensors of its newer class."""
    options = golden.FORMS[form]
    text = {
        "context_length": golden.LENGTH,
        "vocab_size": golden.VOCABULARY,
        "width": golden.WIDTH,
        "heads": golden.HEADS,
        "layers": golden.LAYERS,
        "mlp_ratio": options["mlp_ratio"],
    }
    config = {"embed_dim": golden.EMBED, "quick_gelu": options["quick_gelu"], "text_cfg": text}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    tensors = {f"{prefix}{k}": v.to(dtype) for k, v in golden.weights(text["mlp_ratio"]).items()}
    tensors |= {"logit_scale": torch.ones(()), "visual.proj": torch.ones(2, 2)}
    save_file(tensors, folder / WEIGHTS)
    (folder / "tokenizer.json").write_text(tokenizer().json)
    return folder


def tokenizer() -> Tokenizer:
    """A tokenizer with as many tokens as the golden encoder; its end is the last, as CLIP's."""
    held = json.loads(Tokenizer.trained(["a cat"], golden.VOCABULARY, golden.LENGTH).json)
    used = held["model"]["vocab"]
    start, end = (one["content"] for one in held["added_tokens"])
    words = [word for word in used if word not in (start, end)]
    words += [f"w{n}" for n in range(golden.VOCABULARY - 2 - len(words))]
    held["model"]["vocab"] = {word: n for n, word in enumerate([*words, start, end])}
    for one in held["added_tokens"]:
        one["id"] = held["model"]["vocab"][one["content"]]
    return Tokenizer(json.dumps(held), golden.LENGTH)


@pytest.mark.parametrize("form, prefix", [("gelu", ""), ("quick_gelu", "text.")])
def test_outputs_are_those_of_open_clip(form: str, prefix: str, tmp_path: Path) -> None:
    wanted = json.loads(golden.RECORD.read_text())[form]
    found = frozen_text_folder(str(write(tmp_path, form, prefix)))
    assert (found.width, found.pooled_width) == (golden.WIDTH, golden.EMBED)
    with torch.no_grad():
        states, pooled = found.load(golden.END)(torch.tensor(golden.TOKENS))
    torch.testing.assert_close(states, torch.tensor(wanted["states"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, torch.tensor(wanted["pooled"]), rtol=1e-5, atol=1e-5)


def test_a_run_finds_it_and_fills_its_texts_with_token_0(tmp_path: Path) -> None:
    """Without its own padding, the states after the end would be those of other tokens."""
    model = text_model("transformers", str(write(tmp_path, "gelu")), golden.LENGTH)
    row = model.tokenizer.encode(["a cat"])[0].tolist()
    end = row.index(golden.END)
    assert row[end + 1 :] == [0] * (golden.LENGTH - end - 1)
    assert model.tokenizer.sha256 != tokenizer().sha256
    assert model.load()(model.tokenizer.encode(["a cat", ""])).states.shape == (2, 8, golden.WIDTH)


def test_half_precision_weights_are_read_in_float32(tmp_path: Path) -> None:
    network = frozen_text_folder(str(write(tmp_path, "gelu", dtype=torch.float16))).load(golden.END)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_a_folder_of_both_is_read_as_one_of_transformers(tmp_path: Path) -> None:
    write(tmp_path, "gelu")
    write_folder(tmp_path, "CLIPTextModel")
    assert frozen_text_folder(str(tmp_path)).kind == "CLIPTextModel"


def with_model(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        held["model_cfg"] |= values
        (folder / CONFIG).write_text(json.dumps(held))

    return change


def with_text(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
        with_model(text_cfg=held | values)(folder)

    return change


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "change, says",
    [
        (without(WEIGHTS), "no open_clip_model.safetensors in this folder: save the model"),
        (
            without("tokenizer.json"),
            "no tokenizer.json in this folder: .* with its tokenizer",
        ),
        (with_text(hf_model_name="xlm-roberta-base"), "hf_model_name is 'xlm-roberta-base'; only"),
        (with_text(no_causal_mask=True), "text_cfg.no_causal_mask is True; only text encoders in"),
        (with_text(no_such_key=1), "text_cfg has the unknown key 'no_such_key'; it may change"),
        (with_text(use_pad_mask=True), "text_cfg has the unknown key 'use_pad_mask'"),
        (with_text(tokenizer_kwargs={"clean": "canonicalize"}), "tokenizer_kwargs is {'clean': 'c"),
        (with_text(tokenizer_mode="clips"), "text_cfg.tokenizer_mode is 'clips'; only"),
        (with_text(width=True), "width is True, and must be a whole number above 0"),
        (with_text(layers=0), "layers is 0, and must be a whole number above 0"),
        (with_text(mlp_ratio="4"), "mlp_ratio is '4', and must be a number above 0"),
        (with_text(mlp_ratio=0), "mlp_ratio is 0, and must be a number above 0"),
        (with_text(mlp_ratio=float("nan")), "mlp_ratio is nan, and must be a number above 0"),
        (with_model(quick_gelu="false"), "quick_gelu is 'false', and must be true or false"),
        (with_model(embed_dim=None), "embed_dim is None, and must be a whole number"),
        (with_text(width="12"), "open_clip_config.json: width is '12', and must be a whole number"),
        (lambda f: (f / CONFIG).write_text("{}"), "has no model_cfg with a text_cfg"),
        (shutil.rmtree, "there is no such folder on this machine"),
    ],
)
def test_what_is_no_such_folder_is_refused(
    change: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "open_clip"
    folder.mkdir()
    change(write(folder, "gelu"))
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        frozen_text_folder(str(folder))
    assert "\n" not in str(refused.value)


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    """As open_clip's own files have them, with its defaults."""
    folder = write(tmp_path, "gelu")
    unused: dict[str, Any] = {
        "hf_tokenizer_name": "openai/clip",
        "tokenizer_kwargs": {},
        "tokenizer_mode": None,
    }
    with_text(output_tokens=True, eos_id=2, pool_type="argmax", **unused)(folder)
    assert frozen_text_folder(str(folder)).width == golden.WIDTH


@pytest.mark.parametrize(
    "tokens, says",
    [
        ((1, 999, 8), r"999 tokens, and open_clip_config\.json \d+: they are not"),
        ((1, 9, 8), "folder: its pool_type argmax takes the last token of its vocabulary as the"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_by_the_names_of_open_clip(
    tokens: tuple[int, int, int], says: str, tmp_path: Path
) -> None:
    """Such a folder has neither config.json nor eos_token_id."""
    (folder := tmp_path / "folder").mkdir()
    found = frozen_text_folder(str(write(folder, "gelu")))
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        found.require_tokens(*tokens)
    assert " config.json" not in str(refused.value)
    assert "eos_token_id" not in str(refused.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("ln_final.bias"), "its weights lack 1 tensor, the first is .*final_layer"),
        (lambda t: t.update({"transformer.resblocks.2.ln_1.bias": torch.ones(12)}), "another"),
        (lambda t: t.update({"ln_final.bias": torch.ones(3)}), "cannot be read: .*"),
    ],
)
def test_weights_of_another_network_are_refused(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "gelu")
    tensors: dict[str, Any] = dict(golden.weights(4.0))
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        frozen_text_folder(str(folder)).load(golden.END)
    assert "\n" not in str(refused.value)

"""Key layouts of others against tables written by hand, and what is refused.

tests/golden/test_diffusers_unet.py asks diffusers itself. Of the other two code bases no library is
here to ask: the tables below name, for one small network, every module of theirs.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.models.interop import convert, diffusers_folders
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_schedulers import SCHEDULER, from_scheduler, to_scheduler
from ddpm_ray.models.layers import GUIDED, HO, Variant
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.storage.object_store import write_bytes

TWO_HEADS = replace(GUIDED, num_heads=2)
SIZE = 8, 12  # (H, W)
IMPROVED = replace(TWO_HEADS, resampling_blocks=False)


def spec(variant: Variant = HO, **changes: Any) -> UNetSpec:
    """Two levels of 8 and 4 pixels, attention at the second."""
    made = UNetSpec(
        image_channels=1,
        base_channels=4,
        channel_mults=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        dropout=0.0,
        groups=2,
        num_classes=0,
        condition_channels=0,
        learns_variance=False,
        variant=variant,
    )
    return replace(made, **changes)


def numbered(spec: UNetSpec) -> dict[str, Tensor]:
    """Every parameter of the network, no two numbers alike."""
    network, first, tensors = UNet(spec), 0, {}
    for name, parameter in network.state_dict().items():
        tensors[name] = torch.arange(first, first + parameter.numel()).float().view_as(parameter)
        first += parameter.numel()
    return tensors


# Ours: theirs. Stages of ours: down 0 and, behind what halves, 2; up 0, 1, what doubles, 3, 4.
GUIDED_BLOCKS = {
    "down.0.block": "input_blocks.1.0",
    "down.2.block": "input_blocks.3.0",
    "middle_1.block": "middle_block.0",
    "middle_2.block": "middle_block.2",
    "up.0.block": "output_blocks.0.0",
    "up.1.block": "output_blocks.1.0",
    "up.3.block": "output_blocks.2.0",
    "up.4.block": "output_blocks.3.0",
}
GUIDED_ATTENTIONS = {
    "down.2.attention": "input_blocks.3.1",
    "middle_1.attention": "middle_block.1",
    "up.0.attention": "output_blocks.0.1",
    "up.1.attention": "output_blocks.1.1",
}
GUIDED_PLAIN = {
    "time.dense_1": "time_embed.0",
    "time.dense_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
GUIDED_PARTS = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "time": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",
    "query_key_value": "qkv",
    "out": "proj_out",
}
HO_BLOCKS = {
    "down.0.block": "down.0.block.0",
    "down.2.block": "down.1.block.0",
    "middle_1.block": "mid.block_1",
    "middle_2.block": "mid.block_2",
    "up.0.block": "up.1.block.0",
    "up.1.block": "up.1.block.1",
    "up.3.block": "up.0.block.0",
    "up.4.block": "up.0.block.1",
}
HO_ATTENTIONS = {
    "down.2.attention": "down.1.attn.0",
    "middle_1.attention": "mid.attn_1",
    "up.0.attention": "up.1.attn.0",
    "up.1.attention": "up.1.attn.1",
}
HO_PLAIN = {
    "time.dense_1": "temb.dense.0",
    "time.dense_2": "temb.dense.1",
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
    "down.1.conv": "down.0.downsample.conv",
    "up.2.conv": "up.1.upsample.conv",
}
HO_PARTS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "temb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "nin_shortcut",
    "norm": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
}
CONVOLVED = {"down.1.conv": "input_blocks.2.0.op", "up.2.conv": "output_blocks.1.2.conv"}
IN_BLOCKS = {"down.1": "input_blocks.2.0", "up.2": "output_blocks.1.2"}


def by_hand(
    tensors: dict[str, Tensor], homes: dict[str, str], parts: dict[str, str], ones: int
) -> dict[str, Tensor]:
    """The tensors under the table's names, dense layers of attentions with `ones` more axes."""
    theirs = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        home, _, part = module.rpartition(".")
        if tensor.ndim == 2 and home.endswith("attention"):
            tensor = tensor.view(*tensor.shape, *[1] * ones)
        if module in homes:
            theirs[f"{homes[module]}.{kind}"] = tensor
        elif part == "query_key_value" and part not in parts:
            for one, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"{homes[home]}.{parts[one]}.{kind}"] = piece
        else:
            theirs[f"{homes[home]}.{parts[part]}.{kind}"] = tensor
    return theirs


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "variant, resamplers",
    [(TWO_HEADS, IN_BLOCKS), (IMPROVED, CONVOLVED)],
    ids=["guided", "improved"],
)
def test_guided_diffusions_names_are_those_of_the_table(
    variant: Variant, resamplers: dict[str, str]
) -> None:
    ours = numbered(spec(variant))
    homes = {**GUIDED_BLOCKS, **GUIDED_ATTENTIONS, **GUIDED_PLAIN, **resamplers}
    theirs = by_hand(ours, homes, GUIDED_PARTS, ones=1)
    assert theirs["middle_block.1.qkv.weight"].shape == (24, 8, 1)
    taken = convert.from_guided_diffusion(theirs, spec(variant), new_attention_order=True)
    require_same(taken, ours)
    back = convert.to_guided_diffusion(spec(variant), taken, new_attention_order=True)
    require_same(back, theirs)


def test_hos_names_are_those_of_the_table() -> None:
    ours = numbered(spec())
    theirs = by_hand(ours, {**HO_BLOCKS, **HO_ATTENTIONS, **HO_PLAIN}, HO_PARTS, ones=2)
    assert theirs["mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    taken = convert.from_ho(theirs, spec())
    require_same(taken, ours)
    require_same(convert.to_ho(spec(), taken), theirs)


def test_rows_that_lie_head_by_head_find_their_place() -> None:
    """Two heads of 4 of 8 channels: row 12 h + 4 p + c is channel c of part p of head h."""
    ours = numbered(spec(TWO_HEADS))
    theirs = convert.to_guided_diffusion(spec(TWO_HEADS), ours)
    for h, p, c in ((h, p, c) for h in range(2) for p in range(3) for c in range(4)):
        row = theirs["middle_block.1.qkv.bias"][12 * h + 4 * p + c]
        assert row == ours["middle_1.attention.query_key_value.bias"][8 * p + 4 * h + c]
    require_same(convert.from_guided_diffusion(theirs, spec(TWO_HEADS)), ours)


@pytest.mark.parametrize("knows_null", [False, True])
def test_a_network_of_three_classes_comes_with_a_null_label_or_gets_none_added(
    knows_null: bool,
) -> None:
    asked = spec(TWO_HEADS, num_classes=3)
    ours = numbered(asked)
    if not knows_null:
        ours["label.weight"][3] = 0
    theirs = convert.to_guided_diffusion(asked, ours)
    assert len(theirs["label_emb.weight"]) == 3 + knows_null
    require_same(convert.from_guided_diffusion(theirs, asked), ours)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    theirs = convert.to_ho(spec(), numbered(spec()))
    with pytest.raises(UnsupportedModelError, match=r"lacks conv_in\.weight$"):
        convert.from_ho({k: v for k, v in theirs.items() if k != "conv_in.weight"}, spec())
    extra = {f"ema.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(
        UnsupportedModelError, match=r"no place for ema\.0, ema\.1, ema\.2 and 2 more"
    ):
        convert.from_ho(theirs | extra, spec())
    with pytest.raises(UnsupportedModelError, match=r"conv_in\.bias makes \[5\] where .* \[4\]"):
        convert.from_ho(theirs | {"conv_in.bias": torch.zeros(5)}, spec())
    with pytest.raises(UnsupportedModelError, match=r"lacks \(no place for label\)"):
        convert.from_ho(theirs, spec(num_classes=3))
    with pytest.raises(UnsupportedModelError, match="does not build a network: groups is 3"):
        convert.from_ho(theirs, spec(groups=3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; .* only 'silu' is supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"block_out_channels": [4, 6]}, r"block_out_channels is \[4, 6\]"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types is"),
        ({"sample_size": None}, "sample_size is None; supported is a side"),
        ({"in_channels": 1, "out_channels": 3}, "out_channels is 3; .* only 1"),
        ({"downsample_padding": 2}, "downsample_padding is 2"),
        ({"new_key": "a\x1b[2J"}, r"new_key is 'a\\x1b\[2J', a key that is not supported"),
        ({"_class_name": "UNet3DModel"}, "it is 'UNet3DModel'; supported is UNet2DModel"),
        ({"block_out_channels": "wide"}, "its config is invalid"),
        ({"block_out_channels": [0, 4]}, "its config is invalid"),
        ({"attention_head_dim": 3}, "head_channels 3; an attention over 8 channels"),
    ],
)
def test_configs_that_this_network_cannot_be_are_refused_by_key(
    changes: dict[str, Any], message: str
) -> None:
    config, tensors = convert.to_diffusers(spec(), numbered(spec()), SIZE)
    with pytest.raises(UnsupportedModelError, match=message):
        convert.from_diffusers(config | changes, tensors)


@pytest.mark.parametrize(
    "asked, message",
    [
        (spec(TWO_HEADS), "variant is"),
        (spec(learns_variance=True, condition_channels=1), "image_channels is 1"),
    ],
)
def test_networks_that_theirs_cannot_be_are_refused(asked: UNetSpec, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert.to_diffusers(asked, numbered(asked), SIZE)


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3, "clip_sample": False},
    {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    {"variance_type": "learned_range"},
    {"variance_type": "fixed_large"},
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_a_scheduler_comes_back_as_it_was(config: dict[str, Any]) -> None:
    assert to_scheduler(from_scheduler(config)) == {
        **SCHEDULER,
        **config,
        "_class_name": "DDPMScheduler",
    }


def test_a_schedulers_facts_are_a_runs_keys() -> None:
    """As `schedule.*`, `objective.*` and `sampling.*` stand in a config."""
    config = SCHEDULES[1] | {"variance_type": "learned_range", "num_train_timesteps": 50}
    assert from_scheduler(config) == {
        "schedule": {
            "kind": "scaled_linear",
            "num_steps": 50,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "zero_terminal_snr": False,
        },
        "objective": {"prediction": "epsilon", "variance": "learned_range"},
        "sampling": {"variance": "learned", "clip": True},
    }


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; supported is linear, scaled"),
        ({"variance_type": "fixed_small_log"}, "variance_type is 'fixed_small_log'; supported"),
        ({"variance_type": "learned"}, "variance_type is 'learned'; .* train with learned_range"),
        ({"prediction_type": ["v"]}, r"prediction_type is \['v'\]; supported"),
        ({"thresholding": True}, "thresholding is True; .* only False"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0; .* only 1.0"),
        ({"trained_betas": [0.1]}, "num_train_timesteps is 1000; .* only 1 is"),
        ({"trained_betas": ["a"]}, "trained_betas is not a list of numbers"),
        ({"solver_order": 2}, "solver_order is 2, a key that is not supported"),
        ({"_class_name": "PNDMScheduler"}, "it is 'PNDMScheduler'; supported is DDPMScheduler or"),
    ],
)
def test_schedulers_that_ours_cannot_be_are_refused_by_key(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_scheduler(config)


@pytest.mark.parametrize(
    "group, changes, message",
    [
        ("schedule", {"kind": "edm"}, "kind is 'edm'; it knows linear, scaled_linear, cosine"),
        ("schedule", {"rescale": True}, "rescale is True; .* only False"),
        ("schedule", {"kind": "cosine", "offset": 0.1}, "offset is 0.1; .* only 0.008"),
        ("objective", {"variance": "learned"}, "is 'learned'; .* train with learned_range"),
        ("objective", {"prediction": "edm"}, "prediction is 'edm'; it knows epsilon, x_0, v"),
    ],
)
def test_runs_that_their_scheduler_cannot_be_are_refused(
    group: str, changes: dict[str, Any], message: str
) -> None:
    facts = from_scheduler({})
    facts[group] |= changes
    with pytest.raises(UnsupportedModelError, match=message):
        to_scheduler(facts)


def saved(folder: Path) -> Path:
    diffusers_folders.write_folder(
        folder, spec(), numbered(spec()), from_scheduler({}), SIZE, write_bytes
    )
    return folder


def test_a_folder_without_folders_in_it_is_read_too(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32 keeps all its files side by side."""
    saved(tmp_path)
    for path in [*tmp_path.glob("*/*")]:
        path.rename(tmp_path / path.name)
    for path in (tmp_path / "unet", tmp_path / "scheduler"):
        path.rmdir()
    found, tensors, _, size, *_ = diffusers_folders.read_folder(tmp_path)
    assert size == SIZE
    assert found == spec()
    require_same(tensors, numbered(spec()))


def test_files_that_are_no_such_model_are_refused_by_path(tmp_path: Path) -> None:
    config = saved(tmp_path) / "unet/config.json"
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: cannot be read"):
        diffusers_folders.read_folder(tmp_path)
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match=r"model\.bin: cannot be read: .*No such file"):
        diffusers_folders.read_folder(tmp_path)
    torch.save([torch.zeros(1)], weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModelError, match="something other than tensors by name"):
        diffusers_folders.read_folder(tmp_path)
    config.write_text(json.dumps([]))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: is not a JSON object"):
        diffusers_folders.read_folder(tmp_path)
    config.unlink()
    with pytest.raises(UnsupportedModelError, match=r"config\.json: cannot be read"):
        diffusers_folders.read_folder(tmp_path)


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_that_runs_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Harm()}, tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"model\.bin: cannot be read"):
        diffusers_folders.read_folder(tmp_path)
    assert not (tmp_path / "harm").exists()

"""Weights of a trained model as the first ones of a run: which are taken, and that they stay."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.assembly import (
    checkpoint_loading,
    diffusers_export,
    initial_weights,
    training_run,
)
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.run_config import tokenizer_facts
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.storage.object_store import write_bytes
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.state import TrainingState

SHAPE, CPU = ImageShape(4, 4, 1), torch.device("cpu")
RUN = ("name=tiny", "data.url=none", "schedule.num_steps=10", "sampling.steps=2")
UNET = (
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
)
DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")
AUTOENCODER = (
    "task=autoencoder",
    "autoencoder.base_channels=4",
    "autoencoder.channel_mults=[1,2]",
    "autoencoder.groups=2",
    "autoencoder.blocks_per_level=1",
)
LABELLED = ("model.num_classes=3",)


def configured(*overrides: str) -> RunConfig:
    if "task=autoencoder" in overrides:
        return load_config(RunConfig, None, [*RUN[:2], *overrides])
    network = () if "model.network=dit" in overrides else UNET
    return load_config(RunConfig, None, [*RUN, *network, *overrides])


def state_of(config: RunConfig) -> TrainingState:
    facts = {"config": to_dict(config), "image_shape": list(SHAPE), "data_fingerprint": "none"}
    return training_run.training_state(config, SHAPE, CPU, facts)


def trained(folder: Path, step: int, *overrides: str) -> TrainingState:
    """A run in `folder` with a checkpoint whose weights and EMAs all differ."""
    state = state_of(configured("training.ema_more_decays=[0.5]", *overrides))
    generator = torch.Generator().manual_seed(step)
    for module in (state.model, state.ema.model, state.averages.means["ema-0.5"].model):
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    state.step = step
    CheckpointStore(str(folder / CHECKPOINTS)).save(state.snapshot([]))
    return state


def begun(config: RunConfig) -> TrainingState:
    """The state that each worker of a run begins with."""
    source, state = initial_weights.find_initial_weights(config.training), state_of(config)
    initial_weights.check_initial_weights(source, config, SHAPE)
    initial_weights.load_initial_weights(state, source, config.training)
    return state


def test_all_of_a_run_begins_with_the_chosen_ema(tmp_path: Path) -> None:
    source = trained(tmp_path, 3)
    more = "training.ema_more_decays=[0.9]", f"training.init_from={tmp_path}"
    for ema, wanted in (("ema", source.ema), ("ema-0.5", source.averages.means["ema-0.5"])):
        state = begun(configured(*more, f"training.init_from_ema={ema}"))
        for mean in (state.model, state.ema.model, state.averages.means["ema-0.9"].model):
            for name, value in mean.state_dict().items():
                assert torch.equal(value, wanted.state_dict()[name]), name
        assert state.step == 0
        assert not state.snapshot([]).tensors["optimizer"]  # Adam's moments are its own


SELF, LOW = ("objective.self_conditioning=true",), ("objective.low_resolution_pixels=2",)
MASKS = ("objective.inpainting_masks=true",)


@pytest.mark.parametrize("network, layer", [((), "conv_in."), (DIT, "patch.")], ids=["unet", "dit"])
@pytest.mark.parametrize(
    "theirs, ours, says",
    [
        (LOW, SELF, "sees objective.low_resolution_pixels, and this run objective.self_condition"),
        (SELF, LOW, "sees objective.self_conditioning, and this run objective.low_resolution"),
        (
            (*SELF, *LOW),
            MASKS,
            "sees objective.self_.* and objective.low_.*this run .*masks, which",
        ),
    ],
    ids=str,
)
def test_inputs_of_another_meaning_in_as_many_channels_are_refused_unless_left_out(
    network: tuple[str, ...],
    layer: str,
    theirs: tuple[str, ...],
    ours: tuple[str, ...],
    says: str,
    tmp_path: Path,
) -> None:
    source = trained(tmp_path, 3, *network, *theirs)
    where = f"training.init_from={tmp_path}"
    with pytest.raises(ConfigError, match=f"{says}.*add {layer} to training.init_from_skip"):
        begun(configured(*network, *ours, where))
    state = begun(configured(*network, *ours, where, f"training.init_from_skip=[{layer}]"))
    held, first = source.ema.state_dict(), f"{layer}weight"
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, held[name]) is not name.startswith(layer), name
    assert state.model.state_dict()[first].shape == held[first].shape
    begun(configured(*network, *theirs, where))  # the same inputs


def latents_of(sha256: str) -> LatentCodec:
    """The codec of latents [4, 4, 1], half as large as their images along each side."""
    return LatentCodec(1, 2, ("plain",), (0.0,), (1.0,), autoencoder_sha256=sha256)


def on_latents(state: TrainingState, folder: Path, sha256: str) -> None:
    """Make the last checkpoint in `folder` one of a model of latents."""
    state.step += 1
    state.facts["image_shape"] = [8, 8, 1]
    state.facts |= {
        "codec": "latents",
        "latents": {"channels": 1, "factor": 2, "views": ["plain"], "mean": [0.0], "std": [1.0]},
        "autoencoder": {"url": "nowhere", "sha256": sha256},
    }
    CheckpointStore(str(folder / CHECKPOINTS)).save(state.snapshot([]))


@pytest.mark.parametrize("of_latents", [False, True])
def test_latents_and_pixels_of_as_many_channels_are_not_taken_for_each_other(
    of_latents: bool, tmp_path: Path
) -> None:
    """A model of one does not begin a run on the other, unless its first layer is left out."""
    state = trained(tmp_path, 3)
    if of_latents:
        on_latents(state, tmp_path, "a" * 64)
    ours: Codec = latents_of("a" * 64)
    says = "was trained on pixels, and this run is on latents: name"
    if of_latents:
        ours, says = PIXELS, "was trained on latents, and this run is on pixels: name"
    config = configured(f"training.init_from={tmp_path}")
    source = initial_weights.find_initial_weights(config.training)
    with pytest.raises(ConfigError, match=says):
        initial_weights.check_initial_weights(source, config, SHAPE, ours)
    config = configured(f"training.init_from={tmp_path}", "training.init_from_skip=[conv_in.]")
    initial_weights.check_initial_weights(source, config, SHAPE, ours)


@pytest.mark.parametrize("ours, warned", [("a", False), ("b", True)])
def test_latents_of_another_autoencoder_give_a_warning(
    ours: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_latents(trained(tmp_path, 3), tmp_path, "a" * 64)
    config = configured(f"training.init_from={tmp_path}")
    source = initial_weights.find_initial_weights(config.training)
    initial_weights.check_initial_weights(source, config, SHAPE, latents_of(ours * 64))
    says = "of the autoencoder of sha256 aaaaaaaaaaaa, and this run is on those of bbbbbbbbbbbb"
    assert (says in caplog.text) is warned
    assert bool(caplog.text) is warned


CLASSIFIER = ("task=classifier", "training.grid_every_steps=0", *LABELLED)


def test_a_classifier_does_not_begin_a_denoiser(tmp_path: Path) -> None:
    """Though each tensor of its down path has the name and shape of one of the U-Net's."""
    down = {
        name: one.shape for name, one in trained(tmp_path, 3, *CLASSIFIER).model.named_parameters()
    }
    unet = {
        name: one.shape for name, one in state_of(configured(*LABELLED)).model.named_parameters()
    }
    assert {
        name: shape for name, shape in down.items() if name.startswith("down.")
    }.items() <= unet.items()
    with pytest.raises(ConfigError, match="holds a classifier, and this run trains a U-Net: name"):
        begun(configured(*LABELLED, f"training.init_from={tmp_path}"))


def test_a_classifier_begins_with_the_down_path_of_a_denoiser(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = trained(tmp_path, 3, *LABELLED).ema.state_dict()
    where = f"training.init_from={tmp_path}", "training.init_from_skip=[norm_out.]"
    config = configured(*CLASSIFIER, *where)
    made, drawn = begun(config).model.state_dict(), state_of(config).model.state_dict()
    own = {name for name in made if name.startswith(("norm_out.", "pool.", "out."))}
    assert len(own) == 2 + 5
    for name, value in made.items():
        assert torch.equal(value, drawn[name] if name in own else source[name]), name
    assert "5 not in the model: pool.position" in caplog.text


def test_another_network_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    with pytest.raises(ConfigError, match="holds a U-Net, and this run trains a DiT: name a model"):
        begun(configured(*DIT, f"training.init_from={tmp_path}"))


def test_another_prediction_target_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, 3)
    begun(configured("objective.prediction=v", f"training.init_from={tmp_path}"))
    assert (
        "was trained with objective.prediction=epsilon, and this run with v, which" in caplog.text
    )


TEXT = ("text.encoder=transformer", "text.length=6", "text.width=8", "text.depth=1", "text.heads=2")
CONTRASTIVE = (
    "task=contrastive",
    "contrastive.base_channels=4",
    "contrastive.channel_mults=[1,2]",
    "contrastive.groups=2",
    "contrastive.blocks_per_level=1",
    "contrastive.width=4",
    "training.grid_every_steps=0",
)


@pytest.mark.parametrize("keys, rows", [((), "text.encoder.token."), (CONTRASTIVE, "text.token.")])
def test_token_embeddings_of_another_tokenizer_are_refused_unless_left_out(
    keys: tuple[str, ...], rows: str, tmp_path: Path
) -> None:
    """They have the same shape, and other words."""
    pytest.importorskip("tokenizers", reason="needs the extra [text]")
    theirs, ours = (Tokenizer.trained([text], 259, 6) for text in ("aa", "bb"))
    assert theirs.vocabulary == ours.vocabulary
    base = [*RUN[:2], *(keys or (*RUN[2:], *UNET)), *TEXT]
    config = load_config(RunConfig, None, base)
    facts = {"config": to_dict(config), "image_shape": list(SHAPE), "data_fingerprint": "none"}
    state = training_run.training_state(config, SHAPE, CPU, facts | tokenizer_facts(theirs))
    CheckpointStore(str(tmp_path / CHECKPOINTS)).save(state.snapshot([]))
    where = f"training.init_from={tmp_path}"
    config = load_config(RunConfig, None, [*base, where])
    source = initial_weights.find_initial_weights(config.training)
    initial_weights.check_initial_weights(source, config, SHAPE, tokenizer=theirs)
    says = f"{theirs.sha256[:12]}, and this run those of {ours.sha256[:12]}: .* or add {rows} to"
    with pytest.raises(ConfigError, match=says):
        initial_weights.check_initial_weights(source, config, SHAPE, tokenizer=ours)
    without = load_config(RunConfig, None, [*base, where, f"training.init_from_skip=[{rows}]"])
    initial_weights.check_initial_weights(source, without, SHAPE, tokenizer=ours)


def test_attentions_of_another_form_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of all other layers are taken; those of equal forms give none."""
    pytest.importorskip("tokenizers", reason="needs the extra [text]")
    base, tokenizer = [*RUN, *UNET, *TEXT], Tokenizer.trained(["aa"], 259, 6)
    config = load_config(RunConfig, None, base)
    facts = {"config": to_dict(config), "image_shape": list(SHAPE), "data_fingerprint": "none"}
    state = training_run.training_state(config, SHAPE, CPU, facts | tokenizer_facts(tokenizer))
    CheckpointStore(str(tmp_path / CHECKPOINTS)).save(state.snapshot([]))
    where = f"training.init_from={tmp_path}"
    for keys, warned in (
        (["model.transformer_depth=2", "text.pooled=false"], (True, True)),
        (["model.transformer_depth=2"], (True, False)),
        ([], (False, False)),
    ):
        caplog.clear()
        ours = load_config(RunConfig, None, [*base, *keys, where])
        source = initial_weights.find_initial_weights(ours.training)
        initial_weights.check_initial_weights(source, ours, SHAPE, tokenizer=tokenizer)
        says = (
            "has model.transformer_depth=0, and this run 2, whose attentions it has to learn",
            "and this run has text.pooled=false, which it has to learn",
        )
        assert tuple(line in caplog.text for line in says) == warned
    config = load_config(RunConfig, None, [*base, "text.quick_gelu=true", where])
    source = initial_weights.find_initial_weights(config.training)
    with pytest.raises(ConfigError, match=r"shows it: set text\.quick_gelu=false"):
        initial_weights.check_initial_weights(source, config, SHAPE, tokenizer=tokenizer)


def test_a_diffusers_folder_gives_the_weights_it_was_written_from(tmp_path: Path) -> None:
    source = trained(tmp_path / "run", 3)
    model = checkpoint_loading.trained_model(str(tmp_path / "run"))
    diffusers_export.write_diffusers(model, model.settings, tmp_path / "theirs")
    state = begun(configured(f"training.init_from={tmp_path / 'theirs'}"))
    for name, value in source.ema.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name


@pytest.mark.parametrize("network, layer", [((), "conv_in."), (DIT, "patch.")], ids=["unet", "dit"])
def test_conditioning_images_that_a_diffusers_folder_does_not_name_give_a_warning(
    network: tuple[str, ...], layer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that the run gives, unless its first layer, which sees them, is drawn anew."""
    trained(tmp_path / "run", 3, *network, *LOW)
    model = checkpoint_loading.trained_model(str(tmp_path / "run"))
    diffusers_export.write_diffusers(model, model.settings, tmp_path / "theirs")
    where = f"training.init_from={tmp_path / 'theirs'}"
    begun(configured(*network, *SELF, where))
    says = "does not say which conditioning images its network sees; this run gives it objective.s"
    assert says in caplog.text
    caplog.clear()
    for ours in (), LOW:
        begun(configured(*network, *ours, where, f"training.init_from_skip=[{layer}]"))
        assert not caplog.text


def test_what_is_taken_and_what_is_not_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A labelled run from one without labels, with a new last layer."""
    caplog.set_level(logging.INFO)
    trained(tmp_path, 3)
    where = f"training.init_from={tmp_path}"
    config = configured(*LABELLED, where, "training.init_from_skip=[conv_out.,norm_out.]")
    state, untouched = begun(config), state_of(config)
    assert len(caplog.records) == 1
    text = caplog.text
    assert "(ema of step 3, sha256 " in text
    assert "4 left as they are (training.init_from_skip): norm_out.weight" in text
    assert "1 not in the model: label.weight" in text
    taken = [
        name
        for name, value in untouched.model.state_dict().items()
        if not torch.equal(value, state.model.state_dict()[name])
    ]
    assert f"{len(taken)} tensors taken" in text
    kept = {*state.model.state_dict()} - {*taken}
    assert {"conv_out.weight", "norm_out.bias", "label.weight"} <= kept


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.num_classes=2"], r"label.weight is \[4, 16\] in .* and \[3, 16\] in this network"),
        (["model.num_classes=2"], "add it to training.init_from_skip"),
        (["training.init_from_skip=[lable.]"], "holds 'lable.', but no tensor of the network"),
        (['training.init_from_skip=[""]'], "no tensor of .* is taken"),
        (["training.init_from_ema=ema-0.7"], "no average 'ema-0.7'; it has ema, ema-0.5"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    overrides: list[str], says: str, tmp_path: Path
) -> None:
    trained(tmp_path, 3, *LABELLED)
    with pytest.raises((ConfigError, CheckpointError), match=says):
        begun(configured(*LABELLED, f"training.init_from={tmp_path}", *overrides))


def test_weights_of_another_shape_are_skipped_by_name(tmp_path: Path) -> None:
    trained(tmp_path, 3, *LABELLED)
    where = f"training.init_from={tmp_path}", "training.init_from_skip=[label.]"
    begun(configured("model.num_classes=2", *where))


@pytest.mark.parametrize("network, layer", [((), "conv_in"), (DIT, "patch")])
@pytest.mark.parametrize(
    "conditions, channels",
    [
        (["objective.inpainting_masks=true"], 2),
        (["objective.low_resolution_pixels=2"], 1),
        (["objective.self_conditioning=true", "objective.inpainting_masks=true"], 3),
    ],
)
def test_conditioning_images_have_no_effect_at_first(
    network: tuple[str, ...],
    layer: str,
    conditions: list[str],
    channels: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An inpainting model that begins with an ordinary one predicts the same, known part or not."""
    caplog.set_level(logging.INFO)
    source = trained(tmp_path, 3, *network).ema.model.double().eval()
    state = begun(configured(*network, *conditions, f"training.init_from={tmp_path}"))
    said = f"{layer}.weight widened from 1 to {1 + channels} input channels, the new ones at 0"
    assert said in caplog.text
    assert "not in the model" not in caplog.text
    generator = torch.Generator().manual_seed(0)
    x_t, images = (
        torch.randn(2, count, 4, 4, generator=generator, dtype=torch.float64)
        for count in (1, channels)
    )
    t, known = torch.tensor([3, 7]), Conditioning(known=images)
    wanted = source(x_t, t)
    assert float(wanted.std()) > 0.1
    for model in (state.model, state.ema.model):
        torch.testing.assert_close(model.double().eval()(x_t, t, known), wanted)


def test_widened_weights_may_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in runs that began so with earlier versions: the first layer is drawn anew."""
    caplog.set_level(logging.INFO)
    trained(tmp_path, 3)
    where = f"training.init_from={tmp_path}", "training.init_from_skip=[conv_in.]"
    config = configured("objective.inpainting_masks=true", *where)
    made, drawn = (state.model.state_dict() for state in (begun(config), state_of(config)))
    assert torch.equal(made["conv_in.weight"], drawn["conv_in.weight"])
    assert "input channels" not in caplog.text


def test_a_model_with_other_conditioning_images_is_not_widened(tmp_path: Path) -> None:
    """The order of its input channels may be another one."""
    trained(tmp_path, 3, "objective.low_resolution_pixels=2")
    both = "objective.self_conditioning=true", "objective.low_resolution_pixels=2"
    says = r"conv_in.weight is \[4, 2, 3, 3\] in .* and \[4, 3, 3, 3\] in this network; .*skip"
    with pytest.raises(ConfigError, match=says):
        begun(configured(*both, f"training.init_from={tmp_path}"))


def test_a_skip_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"init_from_skip names tensors, but .*init_from is emp"):
        configured("training.init_from_skip=[label.]")


def test_the_chosen_checkpoint_stays_though_its_run_goes_on(tmp_path: Path) -> None:
    first = trained(tmp_path, 3)
    config = configured(f"training.init_from={tmp_path}")
    source = initial_weights.find_initial_weights(config.training)
    trained(tmp_path, 6)
    assert initial_weights.find_initial_weights(config.training).step == 6
    state = state_of(config)
    initial_weights.load_initial_weights(state, source, config.training)
    assert all(map(torch.equal, state.model.parameters(), first.ema.model.parameters()))


def test_weights_that_are_others_now_are_refused(tmp_path: Path) -> None:
    """A folder of diffusers has no manifest: its files may be replaced."""
    config = configured(f"training.init_from={tmp_path / 'theirs'}")
    found = []
    for step in (3, 6):
        trained(tmp_path / str(step), step)
        model = checkpoint_loading.trained_model(str(tmp_path / str(step)))
        diffusers_export.write_diffusers(model, model.settings, tmp_path / "theirs")
        found.append(initial_weights.find_initial_weights(config.training))
    says = r"its weights have sha256 \w+, and the run began with \w+; restore those"
    with pytest.raises(CheckpointError, match=says):
        initial_weights.load_initial_weights(state_of(config), found[0], config.training)
    initial_weights.load_initial_weights(state_of(config), found[1], config.training)


def test_a_network_of_another_form_is_refused(tmp_path: Path) -> None:
    """Its tensors have our names and shapes, and would be loaded without an error."""
    state = trained(tmp_path, 3)
    state.step, state.facts["variant"] = 4, {"norm_eps": 1e-5}
    CheckpointStore(str(tmp_path / CHECKPOINTS)).save(state.snapshot([]))
    with pytest.raises(
        ConfigError, match=r"is a U-Net with \{'norm_eps': 1e-05\}, which a run can"
    ):
        begun(configured(f"training.init_from={tmp_path}"))


@pytest.mark.parametrize(
    "network, key, value",
    [
        ((), "model.groups", 4),
        ((), "model.head_channels", 2),
        (DIT, "model.heads", 1),
        (DIT, "model.mlp_norm_eps", 1e-5),
        (AUTOENCODER, "autoencoder.groups", 4),
    ],
)
def test_what_no_shape_of_a_tensor_shows_must_be_equal(
    network: tuple[str, ...], key: str, value: float, tmp_path: Path
) -> None:
    """Else all tensors would be loaded, and the network would be another function."""
    trained(tmp_path, 3, *network, f"{key}={value}")
    where = f"training.init_from={tmp_path}"
    says = rf"{key}={value}, and this run has .*; no shape .* shows it: set {key}={value}"
    with pytest.raises(ConfigError, match=says):
        begun(configured(*network, where))
    begun(configured(*network, where, f"{key}={value}"))


def test_a_dit_of_diffusers_is_trained_with_its_norms(tmp_path: Path) -> None:
    """Published ones add 1e-5 in the norms before their MLPs, and the paper's code 1e-6."""
    source = trained(tmp_path / "run", 3, *DIT, "model.mlp_norm_eps=1e-5").ema.model.eval()
    model = checkpoint_loading.trained_model(str(tmp_path / "run"))
    diffusers_export.write_diffusers(model, model.settings, tmp_path / "theirs")
    where = f"training.init_from={tmp_path / 'theirs'}", "model.mlp_norm_eps=1e-5"
    state = begun(configured(*DIT, *where))
    assert isinstance(state.model, DiT)
    assert state.model.spec.mlp_norm_eps == 1e-5
    x_t, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    assert torch.equal(state.model.eval()(x_t, t), source(x_t, t))


@pytest.mark.parametrize("convs", [True, False])
def test_an_autoencoder_of_diffusers_is_trained_on(convs: bool, tmp_path: Path) -> None:
    """Those of 16 channels have no 1x1 convolutions of the latents: ours begin as the identity."""
    spec = AutoencoderSpec(1, 4, 4, (1, 2), 1, 2, middle_attention=False, latent_convs=convs)
    theirs = Autoencoder(spec).eval()
    vae = tmp_path / "pipeline/vae"
    autoencoder_kl.write_folder(vae, spec, theirs.state_dict(), (8, 8), write_bytes)
    config = configured(*AUTOENCODER, f"training.init_from={vae}")
    assert initial_weights.find_initial_weights(config.training).sha256 == (
        trained_autoencoder(str(vae)).sha256
    )
    state = begun(config)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    for model in (state.model, state.ema.model):
        assert isinstance(model, Autoencoder)
        found, wanted = model.eval().encode(x), theirs.encode(x)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(model.decode(wanted.mean), theirs.decode(wanted.mean))


names = st.sets(st.sampled_from([f"{a}.{b}" for a in "abc" for b in "xyz"]), min_size=1)


def parts(fit: initial_weights.TensorMatch) -> Iterator[Any]:
    yield from (fit.taken, fit.skipped, fit.missing)


@given(names, names, st.sets(st.sampled_from(["a.", "b.x", "c"])))
def test_each_tensor_is_in_one_list(network: set[str], model: set[str], skip: set[str]) -> None:
    config = TrainingConfig(init_from="somewhere", init_from_skip=tuple(skip))
    ours, theirs = ({name: torch.zeros(2) for name in sorted(one)} for one in (network, model))
    try:
        fit = initial_weights.match_tensors(ours, theirs, config, "somewhere")
    except ConfigError:
        hit = [one for one in skip if any(name.startswith(one) for name in network)]
        left = {name for name in network & model if not name.startswith(tuple(skip))}
        assert len(hit) < len(skip) or not left
        return
    assert sorted(name for part in parts(fit) for name in part) == sorted(network)
    assert set(fit.taken) <= model
    assert not set(fit.missing) & model
    assert set(fit.unused) == model - network
    assert all(name.startswith(tuple(skip)) for name in fit.skipped)

"""Weights of other libraries become runs that compute the same, or are refused in one line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ddpm_ray
from ddpm_ray.assembly import other_libraries
from ddpm_ray.cli.job import DONE, FAILED, WRONG_CONFIG
from ddpm_ray.cli.main import main
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.jobs import evaluate, export, import_model, sample
from ddpm_ray.models.interop import convert, diffusers_folders
from ddpm_ray.models.layers import GUIDED, HO, Variant
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import NewerFormatError
from ddpm_ray.training import checkpoint_folder
from tests.fixtures.full_disk import fill_disk
from tests.fixtures.job_script import refused

HEADS = replace(GUIDED, num_heads=2, resampling_blocks=True)
IMPROVED = replace(GUIDED, num_heads=4, scale_shift=False, resampling_blocks=False)
SIZES = (
    "image_size=8",
    "model.base_channels=4",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
    "model.groups=2",
    "schedule.num_steps=30",
    "sampling.steps=5",
)
OF_HEADS = ("guided_diffusion.num_heads=2", "guided_diffusion.resampling_blocks=true")
LEARNED = ("objective.variance=learned_range", "objective.loss=hybrid")
HO_LAYOUT, GUIDED_LAYOUT = ("layout=ho", *SIZES), ("layout=guided-diffusion", *SIZES)


def spec(variant: Variant = HO, **changes: Any) -> UNetSpec:
    """The network of SIZES."""
    made = UNetSpec(3, 4, (1, 2), 1, (2,), groups=2, variant=variant)
    return replace(made, **changes)


def network(of: UNetSpec) -> UNet:
    """A network without a weight that is 0, but for a null label of zeros."""
    made = UNet(of)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    if of.num_classes:
        assert made.label is not None
        made.label.weight.data[-1] = 0
    return made.eval().requires_grad_(False)


def imported(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """The result of the job."""
    assert main(import_model.JOB, [str(word) for word in words]) == DONE, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def require_equal(url: str, given: UNet) -> None:
    """The network of the run at `url` has the outputs of `given`, bit for bit."""
    found = ddpm_ray.load(url, "cpu").denoiser.network
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 7, 30])
    labels = torch.tensor([0, 1, 2]) if given.spec.num_classes else None
    asked = Conditioning(labels=labels)
    assert torch.equal(found(x_t, t, asked), given(x_t, t, asked))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "of, keys",
    [
        (spec(), HO_LAYOUT),
        (spec(learns_variance=True), (*HO_LAYOUT, *LEARNED)),
        (spec(HEADS), (*GUIDED_LAYOUT, *OF_HEADS)),
        (spec(HEADS, learns_variance=True), (*GUIDED_LAYOUT, *OF_HEADS, *LEARNED)),
        (spec(HEADS, num_classes=3), (*GUIDED_LAYOUT, *OF_HEADS, "model.num_classes=3")),
        (spec(IMPROVED), (*GUIDED_LAYOUT, "guided_diffusion.scale_shift=false")),
        (
            spec(HEADS),
            (*GUIDED_LAYOUT, *OF_HEADS, "guided_diffusion.new_attention_order=true"),
        ),
    ],
    ids=["ho", "ho-learned", "guided", "learned", "labels", "improved", "new-order"],
)
def test_a_file_comes_back_as_a_run_with_equal_outputs(
    of: UNetSpec,
    keys: tuple[str, ...],
    suffix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = network(of)
    file, run = tmp_path / f"weights{suffix}", tmp_path / "runs/imported"
    if "layout=ho" in keys:
        theirs = convert.to_ho(of, given.state_dict())
    else:
        new = "guided_diffusion.new_attention_order=true" in keys
        theirs = convert.to_guided_diffusion(of, given.state_dict(), new_attention_order=new)
    written(file, theirs)
    result = imported(capsys, file, run, *keys)
    assert result["run"] == str(run)
    assert result["image_shape"] == [8, 8, 3]
    assert result["parameters"] == sum(one.numel() for one in given.parameters())
    assert result["weights_sha256"] == checkpoint_folder.weights_sha256(result["checkpoint"])
    require_equal(str(run), given)
    require_equal(result["checkpoint"], given)


def written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors in the format that the name of the file says."""
    if file.suffix == ".pt":
        torch.save(dict(tensors), file)
    else:
        save_file(dict(tensors), file)


def of_ho(folder: Path, **changes: Tensor) -> Path:
    """A file of Ho et al.'s layout."""
    file = folder / "weights.safetensors"
    written(file, convert.to_ho(spec(), network(spec()).state_dict()) | changes)
    return file


@pytest.mark.parametrize(
    "variant", [HO, replace(GUIDED, head_channels=4)], ids=["ho", "head_channels"]
)
def test_a_folder_of_diffusers_comes_back_with_equal_outputs(
    variant: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another network than Ho et al.'s, too; options that are given win over the folder's."""
    given = network(spec(variant))
    facts: dict[str, dict[str, Any]] = {
        "schedule": {"kind": "cosine", "num_steps": 30},
        "objective": {"prediction": "v"},
        "sampling": vars(SamplingSettings(steps=30)),
    }
    folder, run = tmp_path / "given", tmp_path / "run"
    diffusers_folders.write_folder(
        folder, given.spec, given.state_dict(), facts, (8, 8), object_store.write_bytes
    )
    imported(capsys, folder, run, "layout=diffusers", "sampling.steps=3")
    require_equal(str(run), given)
    loaded, direct = ddpm_ray.load(str(run), "cpu"), ddpm_ray.load(str(folder), "cpu")
    assert loaded.settings == replace(direct.settings, steps=3)
    assert loaded.provenance["config"]["schedule"] == direct.provenance["config"]["schedule"]
    assert loaded.provenance["config"]["objective"] == direct.provenance["config"]["objective"]
    assert (loaded.sample(2) == direct.sample(2, steps=3)).all()


def test_an_imported_run_is_sampled_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    imported(capsys, of_ho(tmp_path), run, *HO_LAYOUT)
    grid = str(tmp_path / "grid.png")
    assert main(sample.JOB, [str(run), "--out", grid, "num_images=4"]) == DONE
    assert Path(grid).stat().st_size > 0
    assert main(export.JOB, [str(run), "--out", str(out)]) == DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 0
    require_equal(str(out), network(spec()))


def test_scores_of_an_imported_run_name_the_file_and_no_ema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = of_ho(tmp_path)
    imported(capsys, file, tmp_path / "run", *HO_LAYOUT)
    average = ddpm_ray.load(str(tmp_path / "run"), "cpu").provenance["average"]["imported"]
    assert average["layout"] == "ho"
    assert average["file"] == "weights.safetensors"
    assert len(average["sha256"]) == 64


def test_scoring_an_imported_run_asks_for_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(capsys, of_ho(tmp_path), tmp_path / "run", *HO_LAYOUT)
    assert main(evaluate.JOB, [str(tmp_path / "run")]) == WRONG_CONFIG
    assert (
        "data_url is empty, and the model does not name its training data"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("variant", [{"rotary": True}, None, [1]], ids=str)
def test_a_variant_of_a_later_version_is_refused(
    variant: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(other_libraries, "asdict", lambda one: later(asdict(one), variant))
    imported(capsys, of_ho(tmp_path), tmp_path / "run", *HO_LAYOUT)
    says = r"run/checkpoints/step-00000000-\S+: its variant is .* does not know; upgrade ddpm_ray"
    with pytest.raises(NewerFormatError, match=says):
        ddpm_ray.load(str(tmp_path / "run"), "cpu")


def later(values: dict[str, Any], variant: object) -> Any:
    """`variant` in place of the fields of a Variant."""
    return variant if "norm_eps" in values else values


def test_weights_and_run_may_be_in_a_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = f"memory://{tmp_path.name}"
    object_store.write_bytes(f"{here}/w.safetensors", of_ho(tmp_path).read_bytes())
    imported(capsys, f"{here}/w.safetensors", f"{here}/run", *HO_LAYOUT)
    require_equal(f"{here}/run", network(spec()))


def test_half_precision_is_stored_as_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = spec(HEADS)
    theirs = convert.to_guided_diffusion(of, network(of).half().state_dict())
    written(tmp_path / "w.pt", theirs)
    imported(capsys, tmp_path / "w.pt", tmp_path / "run", *GUIDED_LAYOUT, *OF_HEADS)
    require_equal(str(tmp_path / "run"), network(of).half().float())


def test_a_network_that_knows_no_null_label_is_not_guided_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = spec(HEADS, num_classes=3)
    written(tmp_path / "w.pt", convert.to_guided_diffusion(of, network(of).state_dict()))
    keys = (*GUIDED_LAYOUT, *OF_HEADS, "model.num_classes=3")
    imported(capsys, tmp_path / "w.pt", tmp_path / "run", *keys)
    model = ddpm_ray.load(str(tmp_path / "run"), "cpu")
    assert model.sample(2, labels=[0, 2]).dtype == np.uint8
    with pytest.raises(ValueError, match="label_dropout"):
        model.sample(2, labels=[0, 2], guidance_scale=2.0)


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"model.base_channels": "8"}, "model.base_channels=4"),
        ({"channels": "1"}, "channels=3"),
        ({"model.blocks_per_level": "2"}, "model.blocks_per_level=1"),
        ({"model.attention_factors": "[1,2]"}, "model.attention_factors=[2]"),
        ({"model.attention_factors": "[]"}, "model.attention_factors=[2]"),
        ({"model.num_classes": "3"}, "model.num_classes=0"),
        (
            {"objective.variance": "learned_range", "objective.loss": "hybrid"},
            "objective.variance=fixed objective.loss=simple",
        ),
        ({"guided_diffusion.scale_shift": "false"}, "guided_diffusion.scale_shift=true"),
        (
            {"guided_diffusion.resampling_blocks": "false"},
            "guided_diffusion.resampling_blocks=true",
        ),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_its_value(
    changes: dict[str, str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with that value the file is imported."""
    of = spec(HEADS)
    file = tmp_path / "w.pt"
    written(file, convert.to_guided_diffusion(of, network(of).state_dict()))
    given = dict(word.split("=", 1) for word in (*GUIDED_LAYOUT, *OF_HEADS))
    words = [f"{key}={value}" for key, value in (given | changes).items()]
    line = refused(capsys, import_model.JOB, FAILED, file, tmp_path / "run", *words)
    assert line.startswith(f"{file}: ")
    assert line.endswith(f"; they fit with {remedy}")
    assert not (tmp_path / "run").exists()
    better = dict(word.split("=", 1) for word in remedy.split())
    words = [f"{key}={value}" for key, value in (given | changes | better).items()]
    imported(capsys, file, tmp_path / "run", *words)


def test_tensors_that_no_option_explains_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = convert.to_ho(spec(), network(spec()).state_dict())
    del theirs["mid.block_1.conv1.weight"]
    written(tmp_path / "w.pt", theirs)
    line = refused(
        capsys, import_model.JOB, FAILED, tmp_path / "w.pt", tmp_path / "run", *HO_LAYOUT
    )
    assert "the file lacks mid.block_1.conv1.weight; no single option makes them fit" in line
    assert not (tmp_path / "run").exists()


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "content", [{"a": Harm()}, [torch.zeros(1)], {1: torch.zeros(1)}, {"a": 3}, b"no zip", b""]
)
def test_a_pt_file_of_anything_but_tensors_is_refused_and_runs_no_code(
    content: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    line = refused(capsys, import_model.JOB, FAILED, file, "run", *HO_LAYOUT)
    assert line.startswith(f"{file}: ")
    assert "not run" in line or "other than tensors" in line or "cannot be read" in line
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held", ["run.json", "checkpoints/latest.json"])
def test_a_destination_that_holds_a_run_is_refused(
    held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    object_store.write_bytes(f"{tmp_path}/run/{held}", b"kept")
    words = of_ho(tmp_path), tmp_path / "run", *HO_LAYOUT
    line = refused(capsys, import_model.JOB, WRONG_CONFIG, *words)
    first = held.partition("/")[0]
    assert line == f"destination is {tmp_path}/run, which holds {first}: name a new folder"
    assert (tmp_path / "run" / held).read_bytes() == b"kept"


def test_an_import_onto_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = of_ho(tmp_path), tmp_path / "run", *HO_LAYOUT
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # as an earlier version left it
    with monkeypatch.context() as patch:
        fill_disk(patch, after=1)
        line = refused(capsys, import_model.JOB, FAILED, *words)
    assert "the disk is full; free some space" in line
    assert not (tmp_path / "run").exists()
    assert main(import_model.JOB, [str(word) for word in words]) == DONE


@pytest.mark.parametrize(
    "words, says",
    [
        (("layout=hoo",), "layout='hoo': choose from diffusers, guided-diffusion, ho"),
        (("layout=ho",), "image_size is 0; layout=ho does not name it"),
        (("image_size=8",), "image_size is given; layout=diffusers reads it from the folder"),
        ((*HO_LAYOUT, "guided_diffusion.num_heads=1"), "layout=ho has no such option"),
        ((*HO_LAYOUT, "channels=2"), "channels is 2; use 1 (grey) or 3 (RGB)"),
        ((*HO_LAYOUT, "image_size=9"), "images are 9 x 9, which 2 levels do not halve evenly"),
        ((*HO_LAYOUT, "model.attention_factors=[4]"), "attention_factors names 4, but the down"),
        (("layout=ho", "image_size=8"), "attention_resolutions names 16 by default, but the"),
        ((*HO_LAYOUT, "objective.weighting=uncertainty"), "which these weights do not hold"),
        (("layout=diffusers",), "layout=diffusers reads a folder of this machine"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = of_ho(tmp_path), tmp_path / "run", *words
    assert says in refused(capsys, import_model.JOB, WRONG_CONFIG, *given)


def test_weights_that_are_not_there_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "none.pt", tmp_path / "run", *HO_LAYOUT
    line = refused(capsys, import_model.JOB, WRONG_CONFIG, *words)
    assert line == f"weights is {tmp_path}/none.pt: there is no such file or folder"

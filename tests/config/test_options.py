"""A config is right, or says on one line per key what is wrong, before anything heavy loads."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ddpm_ray.cli.job import Argument, InterruptedRunError, Job
from ddpm_ray.cli.main import main
from ddpm_ray.config.jobs.cascade import CascadeConfig
from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.jobs.ema_search import AverageConfig
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.jobs.export import ExportConfig
from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.config.jobs.import_weights import ImportConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.jobs.tokenize_captions import TokenizeConfig
from ddpm_ray.config.loading import (
    Config,
    ConfigError,
    flat,
    from_dict,
    load_config,
    to_dict,
    to_yaml,
)
from ddpm_ray.config.model import ModelConfig
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.reading.option_text import choices
from ddpm_ray.config.reading.yaml_text import type_at
from ddpm_ray.config.run import RunConfig
from tests.limits import ENDS_S

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
KINDS: dict[str, type[Any]] = {
    "train": RunConfig,
    "pack_shards": PackConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "average": AverageConfig,
    "evaluate": EvaluateConfig,
    "doctor": DoctorConfig,
    "sweep": SweepConfig,
    "drill": DrillConfig,
    "edit": EditConfig,
    "encode": EncodeConfig,
    "tokenize_captions": TokenizeConfig,
    "cascade": CascadeConfig,
}
JOBS = [job for job in KINDS if (ROOT / "jobs" / f"{job}.py").exists()]
HEAVY = ("torch", "ray", "mlflow", "numpy", "pyarrow", "fsspec", "scipy", "PIL")


def run_config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, None, ["name=a", "data.url=shards", *overrides])


def complaints(*overrides: str) -> list[str]:
    """The lines that `overrides` are refused with, without their `command line: `."""
    with pytest.raises(ConfigError, match=r"^command line: ") as refused:
        run_config(*overrides)
    return [line.removeprefix("command line: ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize(
    "mistyped, meant",
    [
        ("shedule.num_steps=5", "schedule.num_steps"),
        ("schedule.nsteps=5", "schedule.num_steps"),
        ("num_workers=2", "cluster.num_workers"),
        ("schedule.kind.linear=1", "schedule.kind"),
        ("nam=digits", "name"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_one(mistyped: str, meant: str) -> None:
    (line,) = complaints(mistyped)
    assert line.startswith(mistyped.split("=")[0])
    assert line.endswith(f"no such key; did you mean {meant}?")


@pytest.mark.parametrize(
    "override, says",
    [
        ("schedule.num_steps=0", "schedule.num_steps is 0; it must be at least 1"),
        ("schedule.beta_end=1.5", "schedule.beta_end is 1.5; it must be below 1"),
        ("schedule.beta_start=1", "schedule.beta_start is 1.0; it must be below 1"),
        ("schedule.beta_start=0.05", "above schedule.beta_end 0.02"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("training.learning_rate=0", "it must be above 0"),
        ("training.learning_rate=nan", "it must be finite"),
        ("cluster.timeout_s=inf", "it must be finite"),
        ("training.keep_checkpoints=1", "it must be at least 2"),
        ("training.keep_every_steps=1500", "training.checkpoint_every_steps 1000: try 1000"),
        ("training.keep_every_steps=500", "training.checkpoint_every_steps 1000: try 1000"),
        ("training.checkpoint_every_steps=0", "it must be at least 1"),
        ("sampling.eta=1.01", "it must be at most 1"),
        # A divisor of 0 is reported, not divided by.
        ("cluster.num_workers=0", "cluster.num_workers is 0; it must be at least 1"),
        ("data.lanes=0", "data.lanes is 0; it must be at least 1"),
        ("model.groups=0", "model.groups is 0; it must be at least 1"),
        ("model.groups=48", "128 leaves 32: try 16"),
        ("model.channel_mults=[]", "at least 1 per level"),
        ("model.channel_mults=[1,0]", "at least 1 per level"),
        ("sampling.steps=1001", "cannot exceed schedule.num_steps 1000"),
        ("evaluation.widths=[64]", r"choose from [192, 768, 2023, 2048]"),
        ("evaluation.num_images=1", "at least 2 images"),
        ("evaluation.likelihood_steps=1", "the flow from t = 1 to T takes 2 steps or more"),
        (
            "evaluation={precision_recall: true, num_images: 9, kernel_distance_images: 3}",
            "precision_recall is true, of 3 images",
        ),
        ("evaluation.weights_sha256=12", "64 hex digits"),
        ("name=", "name is empty"),
        ("data.url=", "data.url is empty"),
        ("name=a/b", "no '/' and no leading '.'"),
        ("name=..", "no '/' and no leading '.'"),
        ("name=${nowhere}", "name: Interpolation key 'nowhere' not found"),
        # Of the wrong type:
        (
            "training.steps=many",
            "training.steps='many': give a whole number, at least 1; it means: optimiser",
        ),
        ("training.steps=1.5", "give a whole number, at least 1"),
        ("training.steps=null", "training.steps=None: give a whole number, at least 1"),
        ("seed=true", "seed=True: give a whole number"),
        ("data.flip=perhaps", "give true or false"),
        ("schedule.kind=cosin", "choose from linear, scaled_linear, constant, "),
        ("model.channel_mults=[1,x]", "give a list of whole numbers, as [a,b]"),
        ("model.channel_mults=2", "model.channel_mults=2"),
        ("schedule=linear", "a group of keys, not a value; set schedule.<key>"),
        ("data.url=[1", "data.url=[1: while parsing"),
    ],
)
def test_a_bad_value_is_reported_in_one_line(override: str, says: str) -> None:
    (line,) = complaints(override)
    assert line.startswith(override.split("=")[0])
    assert says in line


def test_a_job_that_evaluates_reports_what_a_run_would() -> None:
    says = r"^command line: evaluation\.likelihood_steps is 1; the flow from t = 1 to T takes 2 ste"
    with pytest.raises(ConfigError, match=says):
        load_config(EvaluateConfig, None, ["evaluation.likelihood_steps=1"])


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["schedule.rescale=true", "schedule.num_steps=20"], "becomes 1 and must be below 1"),
        (
            ["schedule.kind=betas"],
            "holds 0 numbers; it needs one for each of schedule.num_steps 1000",
        ),
        (["schedule.betas=[0.1]"], "set schedule.kind=betas"),
        (
            [
                "schedule.kind=betas",
                "schedule.betas=[0.1,1.5]",
                "schedule.num_steps=2",
                "sampling.steps=2",
            ],
            "schedule.betas has 1.5 at t = 2; a variance lies in",
        ),
        (["schedule.zero_terminal_snr=true"], "use objective.prediction=v"),
        (["schedule.kind=one_over_t", "objective.prediction=score"], "leaves no signal at t = T"),
        (["schedule.sigma_min=90"], "must lie below schedule.sigma_max 80.0"),
        (
            [
                "schedule.zero_terminal_snr=true",
                "objective.prediction=v",
                "objective.weighting=min_snr",
            ],
            "whose loss weight would be 0: use objective.weighting=unit",
        ),
        (["objective.variance=learned_range"], "use objective.loss=hybrid"),
        (["objective.loss=vlb"], "use objective.variance=learned_range or objective.loss=simple"),
        (
            ["objective.loss=hybrid", "objective.variance=learned", "objective.weighting=p2"],
            "weights apply to the squared error only",
        ),
        (["objective.timesteps=second_moment"], "balances the terms of the bound"),
        (
            ["objective.inpainting_masks=true", "objective.low_resolution_pixels=4"],
            "a network sees known pixels or a low-resolution image: leave one of the two out",
        ),
        (
            [
                "task=classifier",
                "model.num_classes=2",
                "training.grid_every_steps=0",
                "objective.inpainting_masks=true",
            ],
            "a classifier paints nothing: leave it out",
        ),
        (["sampling.guidance_scale=3"], "trained without labels (model.num_classes=0)"),
        (["sampling.labels=[1]"], "trained without labels (model.num_classes=0)"),
        (
            ["sampling.guidance_scale=3", "model.num_classes=9", "objective.label_dropout=0"],
            "no image was trained without its label",
        ),
        (
            ["sampling.labels=[1,9]", "model.num_classes=9"],
            "sampling.labels has 9; the model knows 0",
        ),
        (["sampling.variance=learned"], "use sampling.sampler=ancestral"),
        (["sampling.variance=learned", "sampling.sampler=ancestral"], "the network predicts none"),
        (["sampling.dynamic_quantile=0.9", "sampling.clip=false"], "it is a way to clip"),
        (
            ["sampling.guidance_below_sigma=1", "sampling.guidance_above_sigma=2"],
            "must lie above sampling.guidance_above_sigma 2.0",
        ),
        (["training.warmup_steps=9", "training.warmup_images=9"], "set one of the two"),
        (["training.ema_half_life_images=9"], "set exactly one of the two"),
        (["training.ema_decay_per_step=0"], "set exactly one of the two"),
        (
            ["training.reduction=elastic", "training.reduction_slots=12"],
            "a power of 2 that divides",
        ),
        (
            [
                "training.reduction=elastic",
                "training.global_batch_size=24",
                "data.lanes=1",
                "training.reduction_slots=16",
            ],
            "divides training.global_batch_size 24: try 8",
        ),
        (
            ["training.reduction=elastic", "cluster.num_workers=16", "data.lanes=1"],
            "it must divide training.reduction_slots 8",
        ),
        (["sampling.variance=fixed_large"], "FID 367 at 10 steps"),
        (["sampling.variance=fixed_large", "sampling.sampler=ancestral"], "use sampling.variance="),
        (["sampling.variance=fixed_large", "sampling.steps=1000"], "defined for eta=1 alone"),
        (["training.global_batch_size=100", "data.lanes=8"], "data.lanes=8 must divide it: try 96"),
        (
            ["training.global_batch_size=100", "cluster.num_workers=3", "data.lanes=4"],
            "cluster.num_workers=3 and data.lanes=4 must divide it: try 96",
        ),
        (["training.global_batch_size=4", "cluster.num_workers=3", "data.lanes=2"], "try 6"),
        (
            ["training.global_batch_size=100", "cluster.num_workers=3"],
            "cluster.num_workers=3 must divide it: try 99",
        ),
        (
            ["model.network=dit", "model.base_channels=64"],
            "model.base_channels is 64, which model.network=dit does not read; leave it out, or "
            "set model.base_channels=128",
        ),
        (["model.network=dit", "model.attention_factors=[2]"], "set model.attention_factors=null"),
        (["model.network=dit", "model.head_channels=8"], "model.head_channels=0"),
        (["model.size=B/2"], "model.size is B/2, which model.network=unet does not read"),
        (["model.heads=4"], "leave it out, or set model.heads=0"),
        (["model.network=dit", "model.heads=5"], "must be a multiple of model.heads 5, and of 4"),
        (["model.network=dit", "model.hidden_size=18", "model.heads=2"], "and of 4"),
        (["model.head_channels=96"], "256 leaves 64: try 32"),
        (
            ["model.head_channels=256", "model.attention_factors=[1]"],
            "must divide the channels of each attention, and 128 leaves 128: try 128",
        ),
        (
            [
                "model.network=dit",
                "task=classifier",
                "model.num_classes=2",
                "training.grid_every_steps=0",
                "evaluation.validation_every_steps=0",
            ],
            "a classifier is half of a U-Net: use model.network=unet",
        ),
    ],
)
def test_what_cannot_go_together_is_reported_with_the_remedy(
    overrides: list[str], says: str
) -> None:
    (line,) = complaints("sampling.steps=9", *overrides)
    assert says in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.rescale=true", "schedule.num_steps=21", "sampling.steps=21"],
        ["schedule.kind=cosine", "schedule.rescale=true", "schedule.num_steps=9"],
        ["sampling.variance=fixed_large", "sampling.steps=1000", "sampling.eta=1"],  # all of T
        ["sampling.variance=fixed_large", "sampling.steps=1000", "sampling.sampler=ancestral"],
        ["training.ema_decay_per_step=0", "training.ema_half_life_images=500"],
        ["training.global_batch_size=96", "cluster.num_workers=3"],
        ["data.source=digits", "data.source="],
        ["data.url=s3://bucket/a=b"],
        [
            "schedule.kind=betas",
            "schedule.betas=[0.1,0.2]",
            "schedule.num_steps=2",
            "sampling.steps=2",
        ],
        ["schedule.zero_terminal_snr=true", "objective.prediction=v"],
        [
            "objective.loss=hybrid",
            "objective.variance=learned_range",
            "objective.timesteps=second_moment",
            "sampling.variance=learned",
            "sampling.sampler=ancestral",
        ],
        ["sampling.guidance_scale=3", "sampling.labels=[0,8]", "model.num_classes=9"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    assert run_config("sampling.steps=9", *overrides).name == "a"


def test_every_bad_key_is_reported_at_once(tmp_path: Path) -> None:
    """One line each, with the place where it was set; YAML and command line together."""
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nschedule: {kind: cosin, beta_end: 2}\nmodle: {dropout: 0.1}\n")
    with pytest.raises(ConfigError, match="schedule") as refused:
        load_config(RunConfig, str(path), ["training.steps=x", "schedule.num_steps=0", "seed=-4"])
    reported = {tuple(line.split(" ")[:3])[:-1] for line in str(refused.value).splitlines()}
    assert {" ".join(place) for place in reported} == {
        f"{path}: schedule.kind='cosin':",
        f"{path}: schedule.beta_end",
        f"{path}: modle.dropout=0.1:",
        "command line:",
    }
    assert len(str(refused.value).splitlines()) == 6


def test_a_misspelt_bound_of_an_option_is_not_left_out() -> None:
    with pytest.raises(KeyError, match="atleast"):
        option(1, "a count", atleast=1)  # type: ignore[call-arg]


def test_several_rules_at_once_give_one_line_per_key() -> None:
    sizes = "training.global_batch_size=7", "cluster.num_workers=2"
    lines = complaints("schedule.beta_start=3", "name=a/b", *sizes)
    keys = [line.split(" ")[0] for line in lines]
    assert keys == ["schedule.beta_start", "name", "training.global_batch_size"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("name: [a\n", "line 1, column 7"),
        ("name: a\nname: b\n", "found duplicate key name .*line 2"),
        ("- name\n", "holds a list; give keys and values"),
        ("schedule:\n", "a group of keys, not a value"),
        ("name: {a: 1}\n", "name.a=1: no such key; did you mean name"),
        ("name: \x00\n", "run.yaml: "),
    ],
)
def test_a_broken_file_is_reported_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        load_config(RunConfig, str(path), [])
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_reported_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match=r"digit\.yaml: no such file; here are: .*digits\.yaml"):
        load_config(RunConfig, str(tmp_path / "digit.yaml"), [])
    with pytest.raises(ConfigError, match=r"is a folder, not a file; here are: .*digits\.yaml"):
        load_config(RunConfig, str(tmp_path), [])
    with pytest.raises(ConfigError, match=r"then key=value, as conf/train/\w+\.yaml name=x$"):
        load_config(RunConfig, "name=x", [str(tmp_path / "digits.yaml")])


def test_the_command_line_wins_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ndata: {url: x}\nseed: 1\nschedule: {num_steps: 100}\n")
    config = load_config(RunConfig, str(path), ["seed=2", "schedule.kind=cosine", "seed=3"])
    assert (config.seed, config.schedule.kind, config.schedule.num_steps) == (3, "cosine", 100)


def test_of_two_forms_of_one_option_the_later_source_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for form, other in (("factors", "resolutions"), ("resolutions", "factors")):
        path.write_text(f"name: a\ndata: {{url: x}}\nmodel: {{attention_{form}: [2]}}\n")
        model = load_config(RunConfig, str(path), [f"model.attention_{other}=[]"]).model
        assert getattr(model, f"attention_{other}") == ()
        assert getattr(model, f"attention_{form}") is None
        both = [f"model.attention_{form}=[2]", f"model.attention_{other}=[4]"]
        with pytest.raises(ConfigError, match="are names of one option; give") as error:
            load_config(RunConfig, str(path), both)
        assert len(str(error.value).splitlines()) == 1


def test_null_beside_the_other_form_of_an_option_is_no_second_name() -> None:
    null, given = "model.attention_factors=null", "model.attention_resolutions=[4]"
    for overrides in ([null, given], [given, null]):
        model = load_config(RunConfig, None, ["name=a", "data.url=x", *overrides]).model
        assert model.attention_resolutions == (4,)
        assert model.attention_factors is None


def test_the_order_of_attention_factors_makes_no_other_network() -> None:
    options = [ModelConfig(attention_factors=factors) for factors in ((1, 4), (4, 1), (4, 1, 4))]
    assert len({one.for_images(16, 16) for one in options}) == 1


@pytest.mark.parametrize(
    "given, sizes",
    [
        ([], (2, 12, 384, 6)),
        (["model.size=XL/4"], (4, 28, 1152, 16)),
        (["model.size=L/8", "model.depth=3", "model.heads=4"], (8, 3, 1024, 4)),
    ],
)
def test_a_dit_has_the_papers_sizes_unless_they_are_given(
    given: list[str], sizes: tuple[int, ...]
) -> None:
    """Whichever form they were given in, the network is the same, and so are its options."""
    model = run_config("model.network=dit", *given).model.for_images(32, 32)
    patch_size, depth, hidden_size, heads = sizes
    by_number = ModelConfig("dit", patch_size=patch_size, depth=depth)
    assert model == replace(by_number, hidden_size=hidden_size, heads=heads).for_images(32, 32)
    assert tuple(model.shown_sizes.values()) == sizes


def random_config(kind: type[Config], dice: random.Random) -> Config:
    """Some value of its own type under each key of `kind`, in range or not."""
    config = kind()
    for key, value in flat(kind()).items():
        texts = {
            bool: dice.random() < 0.5,
            int: dice.randrange(-(2**50), 2**50),
            float: dice.gauss() * 10.0 ** dice.randrange(-300, 300),
            str: "".join(dice.choices("aZ0_ .:/='\"\n#{[-\u00e9\u2192", k=dice.randrange(9))),
            tuple: tuple(dice.choices(range(-9, 9), k=dice.randrange(4))),
        }
        if key in ("space", "faults"):
            texts[tuple] = {"space": ({"a.b": [1, "x"]}, {}), "faults": ("kill@batch", "x y")}[key]
        declared = type_at(type(config), key)
        if declared == tuple[str, ...] and key not in ("space", "faults"):
            texts[tuple] = ("a", "b.c")
        if value is None:  # of an option that may be null: a value of its other type
            (other,) = set(get_args(declared)) - {NoneType}
            config = replaced(config, key, texts[get_origin(other) or other])
        elif not choices(declared):
            config = replaced(config, key, texts[type(value)])
    return config


@pytest.mark.parametrize("kind", KINDS.values())
@settings(max_examples=8)
@given(st.randoms(use_true_random=True))
def test_a_config_comes_back_from_json_and_yaml(kind: type[Any], dice: random.Random) -> None:
    config = random_config(kind, dice)
    assert from_dict(kind, json.loads(json.dumps(to_dict(config)))) == config
    read: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert from_dict(kind, read) == config


def replaced(config: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    return dataclasses.replace(
        config, **{head: replaced(getattr(config, head), rest, value) if rest else value}
    )


@pytest.mark.parametrize(
    "values, saved_by, says",
    [
        (
            {"training": {"warmth": 3}},
            "9.1.0",
            r"a saved config has training\.warmth, which ddpm_ray [^ ]+ does not know; "
            r"ddpm_ray 9\.1\.0 saved it: upgrade to that version",
        ),
        ({"warmth": 3}, "", r"has warmth, which .*; a later version saved it: upgrade ddpm_ray"),
        ({"warmth": {"a": {}}}, "", r"has warmth\.a, which"),
        ({"schedule": {"kind": "snake"}}, "9.1.0", r"schedule\.kind: .*'snake'.*9\.1\.0 saved it"),
        ({"schedule": 5}, "9.1.0", r"a saved config has schedule, which"),
    ],
)
def test_a_config_of_a_later_version_is_refused_with_that_version(
    values: dict[str, Any], saved_by: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^[^\n]*{says}[^\n]*$"):
        from_dict(RunConfig, values, saved_by)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_config_of_ours_loads_and_says_what_it_is_for(path: Path) -> None:
    kind = {"train": RunConfig}.get(path.parent.name)
    if kind is not None:
        assert load_config(kind, str(path), []).name
    lines = path.read_text().splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert len(header) >= 3, "purpose, command, cost"
    command = " ".join(line for line in header if "jobs/" in line)
    assert f"jobs/{path.parent.name}.py {path.relative_to(ROOT)}" in command
    assert any(line.startswith("# Cost:") for line in header)


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_names_every_key(job: str) -> None:
    shown = in_a_process(job, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    found = {line.split()[0].partition("=")[0] for line in shown.stdout.splitlines() if line}
    below_run = {key for key in flat(KINDS[job]()) if key.startswith("run.")}  # by `--help run`
    assert set(flat(KINDS[job]())) - below_run <= found
    assert f"python jobs/{job}.py" in shown.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_printed_config_is_the_config(path: Path, tmp_path: Path) -> None:
    kind = KINDS[path.parent.name]
    key = "run.name" if kind is DrillConfig else "name"
    config = replaced(load_config(kind, str(path), []), key, 'it\'s: a "name"')
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(kind, str(tmp_path / "printed.yaml"), []) == config


LISTING_MODULES = """
import atexit, runpy, sys
job, sys.argv = sys.argv[1], sys.argv[1:]
heavy = {heavy}
atexit.register(lambda: print("loaded:", [m for m in heavy if m in sys.modules], file=sys.stderr))
runpy.run_path(job, run_name="__main__")
"""


def in_a_process(
    job: str, *arguments: str, program: str | None = None
) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "jobs" / f"{job}.py")
    start = ["-c", program, script] if program else [script]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )


POSITIONAL = {
    "train": ["conf/train/digits.yaml"],
    "pack_shards": ["source", "destination"],
    "sample": ["runs/a", "--out", "grid.png"],
    "evaluate": ["runs/a"],
    "doctor": [],
    "sweep": ["conf/sweep/quick.yaml"],
    "drill": ["conf/drill/digits.yaml"],
    "edit": ["runs/a", "image.png", "--out", "edited.png"],
    "export": ["runs/a", "--out", "folder"],
    "import": ["weights", "runs/a"],
    "average": ["runs/a"],
    "encode": ["runs/a", "data", "latents"],
    "tokenize_captions": ["data", "--out", "tokenizer.json"],
    "cascade": ["--out", "folder", "prior=a", "decoder=b"],
}


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_config_ends_before_anything_heavy_loads(job: str) -> None:
    """Exit code 2, one `error:` line per key, nothing on stdout: under 2 s, for it loads little."""
    given = POSITIONAL[job]
    own = {
        "pack_shards": "channels=7",
        "doctor": "timeout_s=-7",
        "import": "image_size=-7",
        "sweep": "run.sampling.eta=7",
    }
    own["drill"] = own["sweep"]
    own |= {"encode": "batch_size=0", "tokenize_captions": "length=2"}
    own["cascade"] = "candidates=0"
    some = own.get(job, "sampling.eta=7")
    program = LISTING_MODULES.format(heavy=HEAVY)
    ended = in_a_process(job, *given, some, "colour=red", program=program)
    assert (ended.returncode, ended.stdout) == (2, "")
    *errors, loaded = ended.stderr.splitlines()
    assert loaded == "loaded: []"
    assert sorted(line.partition(" ")[0] for line in errors) == ["error:", "error:"]
    assert some.partition("=")[0] + " is " in ended.stderr
    assert "colour='red': no such key" in ended.stderr


def job_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, work: Any = None) -> int:
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    uri = Argument("model_uri", "a model")
    return main(Job("sample", "Usage.", SampleConfig, work or done, (uri,)))


def done(config: SampleConfig, arguments: Namespace) -> dict[str, Any]:
    return {"model": arguments.model_uri, "images": config.num_images}


def test_the_last_line_of_stdout_is_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job_of(["runs/a", "num_images=3"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"model": "runs/a", "images": 3}


@pytest.mark.parametrize("name, continues", [("train", True), ("sample", False)])
def test_an_interrupted_job_says_whether_it_continues(
    name: str, continues: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job: Job[Any] = import_module(f"ddpm_ray.jobs.{name}").JOB

    def stop(config: Any, arguments: Namespace) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert main(replace(job, run=stop, prepare=None), POSITIONAL[name]) == 130
    more = "; the same command continues from the last commit" if continues else ""
    assert capsys.readouterr().err == f"interrupted{more}\n"


FULL = """
from ddpm_ray.cli.job import Job
from ddpm_ray.cli.main import main
from ddpm_ray.config.jobs.sample import SampleConfig
raise SystemExit(main(Job("sample", "Usage.", SampleConfig, lambda *_: {"a": 1}), []))
"""


def test_a_result_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", FULL],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=ENDS_S,
            check=False,
        )
    says = "error: the result cannot be written to stdout: No space left on device\n"
    assert (ended.stderr, ended.returncode) == (says, 1)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "required: MODEL_URI"),
        (["a", "b"], "'b' is not of the form key=value"),
        (["a", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_wrong_arguments_are_reported(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert job_of(arguments, monkeypatch) == 2
    shown = capsys.readouterr()
    assert (shown.out, says in shown.err, shown.err.count("\n")) == ("", True, 1)


@pytest.mark.parametrize(
    "error, code, says",
    [
        (ConfigError("name is x\nseed is y"), 2, "error: name is x\nerror: seed is y\n"),
        (InterruptedRunError("stopped at step 3"), 130, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            RuntimeError("two\nlines"),
            1,
            "error: two lines (RuntimeError; DDPM_RAY_TRACEBACK=1 shows where)\n",
        ),
    ],
)
def test_however_a_job_ends_it_says_so_in_a_line(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(config: SampleConfig, arguments: Namespace) -> dict[str, Any]:
        raise error

    assert job_of(["runs/a"], monkeypatch, work) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert says in shown.err

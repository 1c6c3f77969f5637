"""A sweep's config is right, or says on one line per key what is wrong, before a trial starts."""

import itertools
from pathlib import Path
from typing import Literal

import pytest

from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.search_space import FIXED, is_range
from ddpm_ray.config.jobs.sweep import SweepConfig, reported_metrics
from ddpm_ray.config.loading import ConfigError, flat, load_config, with_values
from ddpm_ray.config.run import RunConfig
from ddpm_ray.evaluation.feature_metrics import metric_names
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "conf/sweep").glob("*.yaml"))
SPACE = "{schedule.num_steps: [100, 200]}"
SET = ["name=a", "run.data.url=shards", "run.evaluation.num_images=50", "run.training.steps=9000"]


def sweep_config(*overrides: str, space: str = SPACE) -> SweepConfig:
    return load_config(SweepConfig, None, [*SET, f"space=[{space}]", *overrides])


def complaints(*overrides: str, space: str = SPACE) -> list[str]:
    """The lines that a sweep is refused with, without their `command line: `."""
    with pytest.raises(ConfigError, match=r"^command line: ") as refused:
        sweep_config(*overrides, space=space)
    return [line.removeprefix("command line: ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize(
    "space, says",
    [
        # Of the key:
        ("{schedule.nsteps: [1]}", "schedule.nsteps=1: no such key; did you mean schedule.num_ste"),
        ("{run.seed: [4]}", "run.seed=4: no such key; did you mean seed?"),
        ("{schedule: [linear]}", "schedule='linear': a group of keys, not a value; set schedule."),
        (
            "{model.channel_mults.0: [1]}",
            "model.channel_mults.0=1: no such key; did you mean model.channel_mults?",
        ),
        # Of a choice:
        ("{schedule.num_steps: [9, x]}", "schedule.num_steps='x': give a whole number"),
        ("{schedule.num_steps: [null]}", "schedule.num_steps=None: give a whole number"),
        ("{schedule.kind: [cosin]}", "schedule.kind='cosin': choose from linear, "),
        ("{model.channel_mults: [[1], 2]}", "model.channel_mults=2: give a list of whole"),
        # Neither choices nor a range:
        ("{schedule.num_steps: 5}", "schedule.num_steps is 5; give choices, as [a, b], or a range"),
        ("{schedule.num_steps: []}", "schedule.num_steps is []; give choices, as [a, b]"),
        ("{schedule.kind: cosine}", "schedule.kind is 'cosine'; give choices, as [a, b]"),
        # A range where a grid needs choices:
        ("{seed: {low: 1, high: 5}}", "seed is a range, and a grid needs choices; list them, or"),
    ],
)
def test_what_cannot_be_searched_is_reported_in_one_line(space: str, says: str) -> None:
    (line,) = complaints(space=space)
    assert line.startswith(f"space.{says}")


@pytest.mark.parametrize(
    "bounds, says",
    [
        ("low: 5, high: 5", "seed goes from 5 to 5; low must be below high"),
        ("low: 9, high: 5", "seed goes from 9 to 5; low must be below high"),
        ("low: 0, high: 5, log: true", "seed begins at 0; a range on a log scale must begin above"),
        ("low: 1, high: 9, log: true, step: 2", "seed has log and step; a range knows one of the"),
        ("low: 1, top: 5", "seed has ['top']; a range knows low, high, log and step"),
        ("low: 1", "seed goes from 1 to None; a range needs the numbers low and high"),
        ("low: one, high: 2", "seed goes from 'one' to 2; a range needs the numbers low and high"),
        ("low: 1, high: .inf", "seed goes from 1 to inf; a range needs the numbers low and high"),
        ("low: 1.5, high: 3", "seed=1.5: give a whole number, at least 0"),
    ],
)
def test_a_range_that_is_none_is_reported_in_one_line(bounds: str, says: str) -> None:
    (line,) = complaints("search.kind=tpe", "search.trials=5", space=f"{{seed: {{{bounds}}}}}")
    assert line.startswith(f"space.{says}")


@pytest.mark.parametrize("step", ["0.5", "-2", "x", "[1]"])
def test_a_step_that_leads_nowhere_is_reported(step: str) -> None:
    """Else it is the searcher that fails, when the first trial is already paid for."""
    space = f"{{seed: {{low: 1, high: 9, step: {step}}}}}"
    (line,) = complaints("search.kind=random", "search.trials=5", space=space)
    assert line.startswith("space.seed")
    assert "step" in line


@pytest.mark.parametrize("space", ["", "{}", "{seed: [1]}, {}"])
def test_an_empty_space_is_reported(space: str) -> None:
    (line,) = complaints(space=space)
    assert line.startswith("space is empty; give it at least one key of the run with choices")


@pytest.mark.parametrize("space", ["3", "[3]", "null", "{seed: [1, 2]}"])
def test_a_space_that_is_no_list_of_mappings_is_reported(space: str) -> None:
    """The last is a mapping alone: a dash was forgotten."""
    with pytest.raises(ConfigError, match=r"^command line: space") as refused:
        load_config(SweepConfig, None, [*SET, f"space={space}"])
    assert len(str(refused.value).splitlines()) == 1


def test_the_keys_of_all_branches_are_reported_each_mistake_once() -> None:
    lines = complaints(space="{seed: [1, x], training.steps: [5]}, {seed: [x, y]}")
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "space.seed='x'",
        "space.training.steps",
        "space.seed='y'",
    ]


VARIED = ("seed", "schedule.", "model.", "training.", "sampling.", "data.flip")
FIXED_KEYS = [
    "name",
    "storage",
    "task",
    "training.core_seconds",
    "data.source",
    "training.steps",
    "sampling.steps",
    "sampling.seed",
    *(key for key in flat(RunConfig()) if key.startswith(("evaluation.", "tracking.", "cluster."))),
]


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_what_must_be_the_same_in_all_trials_cannot_be_varied(key: str) -> None:
    """Choices or a range; with the reason and where to set it instead."""
    for candidates in ("[1, 2]", "{low: 1, high: 2}"):
        (line,) = complaints(space=f"{{{key}: {candidates}}}")
        assert line.startswith(f"space.{key} cannot be varied: ")
        assert line.endswith(f"; set run.{key} for all trials")


def test_all_else_that_defines_a_model_can_be_varied() -> None:
    """A fixed prefix does not take its neighbours along."""
    values = flat(RunConfig())
    free = [key for key in values if key.startswith(VARIED) and key not in FIXED_KEYS]
    assert {"schedule.num_steps", "training.learning_rate", "model.dropout", "seed"} <= set(free)
    for key in free:
        config = SweepConfig(name="a", space=({key: [values[key]]},))
        assert not [line for line in config.problems() if line.startswith("space")]


def test_each_fixed_key_is_a_key_of_the_run() -> None:
    """One that was renamed would be free in silence."""
    known = flat(RunConfig())
    assert all(any(key.startswith(prefix) for key in known) for prefix in FIXED)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["stopping.kind=pbt"], "stopping.kind is 'pbt'; population-based training copies weights"),
        (["metric=eval/fd_digits"], "metric is 'eval/fd_digits', which no trial reports; with"),
        (["search.kind=tpe"], "search.trials is 0; say how many trials search.kind=tpe makes"),
        (["search.kind=random"], "search.trials is 0; say how many trials search.kind=random"),
        (["stopping.every_steps=9000"], "stopping.every_steps is 9000 and stopping.first_step 0;"),
        (["stopping.first_step=9000"], "stopping.every_steps is 1000 and stopping.first_step 9000"),
        (["run.evaluation.num_images=0"], "run.evaluation.num_images is 0; trials are compared by"),
        (["run.evaluation.num_images=1"], "run.evaluation.num_images is 1; scores need at least"),
        (["run.schedule.num_steps=0"], "run.schedule.num_steps is 0; it must be at least 1"),
        (["run.data.url="], "run.data.url is empty; give it a value"),
        (["run.name=a/b"], "run.name is 'a/b'; it names a folder: no '/' and no leading '.'"),
        (["name="], "name is empty; give it a value, as in name=..."),
        (["name=a/b"], "name is 'a/b'; it names a folder: no '/' and no leading '.'"),
        (["stopping.reduction_factor=1"], "stopping.reduction_factor is 1.0; it must be above 1"),
        (["search.trials=-1"], "search.trials is -1; it must be at least 0"),
        (["run_form=x"], "run_form='x': no such key; did you mean run_from?"),
        (["run.shedule.num_steps=9"], "run.shedule.num_steps=9: no such key; did you mean run.sch"),
        (["search.kind=gird"], "search.kind='gird': choose from grid, random, tpe; "),
    ],
)
def test_a_bad_value_is_reported_in_one_line(overrides: list[str], says: str) -> None:
    (line,) = complaints(*overrides)
    assert line.startswith(says)


def test_the_refusal_of_pbt_says_why_and_what_to_use_instead() -> None:
    (line,) = complaints("stopping.kind=pbt")
    assert "a beta schedule or T defines the model, so weights do not carry over" in line
    assert line.endswith("use asha or median")


def test_a_metric_that_no_trial_reports_is_reported_with_those_they_do() -> None:
    (line,) = complaints("metric=eval/fd_digits", "run.evaluation.widths=[192,2048]")
    assert line.endswith("they report eval/fid192, eval/fid, eval/kid192, eval/kid")


LATENTS = "{data.url: [f4, f8]}"
REFERENCE = "run.evaluation.reference_url=images"
AUTOENCODERS = (
    "run.task=autoencoder",
    "stopping.kind=none",
    "run.training.grid_every_steps=0",
)
CHANNELS = "{autoencoder.latent_channels: [4, 8], autoencoder.channel_mults: [[1, 2], [1, 2, 4]]}"


@pytest.mark.parametrize(
    "overrides, space, says",
    [
        ([REFERENCE], LATENTS, "stopping.kind is 'asha', but losses on different latents cannot"),
        (["stopping.kind=none"], LATENTS, "space.data.url is given, and run.evaluation.reference_"),
        (
            ["stopping.kind=none", REFERENCE, "run.data.url="],
            f"{LATENTS}, {SPACE}",
            "run.data.url is empty; give it a value",
        ),
        (["core_seconds=9", "run.training.core_seconds=8"], SPACE, "core_seconds is 9 and run.tra"),
        (
            ["run.training.core_seconds=8", "run.training.learning_rate_decay=cosine"],
            SPACE,
            "run.training.core_seconds is 8, which ends the run before",
        ),
        (
            [*AUTOENCODERS],
            "{data.url: [a, b]}",
            "space.data.url cannot be varied: the scores of an auto",
        ),
        (
            [*AUTOENCODERS, "stopping.kind=median"],
            CHANNELS,
            "stopping.kind is 'median', but an auto",
        ),
        ([*AUTOENCODERS, "metric=eval/fid"], CHANNELS, "metric is 'eval/fid', which no trial rep"),
    ],
)
def test_what_autoencoders_or_budgets_do_not_allow_is_reported_in_one_line(
    overrides: list[str], space: str, says: str
) -> None:
    (line,) = complaints(*overrides, space=space)
    assert line.startswith(says)


def test_data_sets_are_searched_with_a_reference_and_without_early_stopping() -> None:
    keys = ("stopping.kind=none", REFERENCE)
    config = sweep_config(*keys, "run.data.url=", space=LATENTS)
    assert config.data_urls == ("f4", "f8")
    assert not config.compares_losses
    config = sweep_config(*keys, space=f"{LATENTS}, {SPACE}")
    assert config.data_urls == ("f4", "f8", "shards")  # the second mapping's is that of the run
    assert sweep_config().data_urls == ("shards",)
    assert sweep_config().compares_losses


@pytest.mark.parametrize(
    "overrides, score",
    [
        ([], "eval/rfid"),
        (["run.evaluation.widths=[192]"], "eval/rfid192"),
        (["run.evaluation.features=digits"], "eval/rfd_digits"),
        (["run.evaluation.features=none"], "eval/psnr"),
        (["metric=eval/ssim"], "eval/ssim"),
    ],
)
def test_autoencoders_are_compared_by_their_reconstructions(
    overrides: list[str], score: str
) -> None:
    assert sweep_config(*AUTOENCODERS, *overrides, space=CHANNELS).score == score


@pytest.mark.parametrize(
    "overrides",
    [
        ["stopping.kind=none", "stopping.every_steps=9000"],  # no decision, no last step for it
        ["stopping.kind=median", "stopping.every_steps=8999"],
        ["stopping.first_step=8999"],
        ["search.kind=grid", "search.trials=1"],
        ["metric=eval/kid"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    assert sweep_config(*overrides).name == "a"


def test_the_score_is_the_first_that_trials_report_unless_it_is_named() -> None:
    assert sweep_config().score == "eval/fid"
    assert sweep_config("run.evaluation.features=digits").score == "eval/fd_digits"
    assert sweep_config("metric=eval/kid").score == "eval/kid"


FEATURES: tuple[Literal["inception", "digits"], ...] = ("inception", "digits")
EVERY_CHOICE = [
    EvaluationConfig(features=features, widths=widths, kernel_distance=kernel)
    for features, kernel in itertools.product(FEATURES, (True, False))
    for count in (1, 2, 3)
    for widths in itertools.permutations((192, 2023, 2048), count)
]


@pytest.mark.parametrize("config", EVERY_CHOICE, ids=lambda c: f"{c.features}{c.widths}")
def test_a_sweep_knows_the_scores_by_the_names_that_an_evaluation_gives_them(
    config: EvaluationConfig,
) -> None:
    """The config loads without torch, so the names stand in it a second time."""
    widths = config.widths if config.features == "inception" else (64,)
    assert config.features != "none"
    net = FeatureNet(config.features, widths, lambda images: {}, {})
    given = {name for width in widths for name in metric_names(net, width)[:2]}
    given -= {"eval/kid_spatial"}  # which is not taken: no kernel was made for places
    kernel = {name for name in given if name.startswith("eval/kd_") or "kid" in name}
    assert set(reported_metrics(config)) == (given if config.kernel_distance else given - kernel)
    first = metric_names(net, widths[0])[0]  # a Frechet distance, before any kernel distance
    assert reported_metrics(config)[0] == first


RUN_FILE = "name: base\nseed: 3\ndata: {url: shards}\nschedule: {num_steps: 77, kind: cosine}\n"
SWEEP_FILE = """
name: a
run_from: {run_from}
space: [{{model.dropout: [0.0, 0.1]}}]
run:
  schedule: {{num_steps: 88}}
  evaluation: {{num_images: 50}}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A sweep's file and the run's file that it is filled from."""
    run, sweep = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    run.write_text(RUN_FILE)
    sweep.write_text(SWEEP_FILE.format(run_from=run))
    return sweep, run


def test_a_run_file_fills_what_the_sweep_file_and_the_command_line_leave(
    files: tuple[Path, Path],
) -> None:
    config = load_config(SweepConfig, str(files[0]), ["run.seed=5"])
    assert config.run.seed == 5  # command line, over the run's file
    assert config.run.schedule.num_steps == 88  # the sweep's file, over the run's
    assert config.run.schedule.kind == "cosine"  # the run's file, over the default
    assert config.run.schedule.beta_end == 0.02  # the default
    assert (config.name, config.run.name) == ("a", "base")
    again = load_config(SweepConfig, str(files[0]), ["run.schedule.num_steps=99"])
    assert (again.run.schedule.num_steps, again.run.seed) == (99, 3)


def test_the_command_line_names_another_run_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Which is then the only one: nothing of the first is left."""
    (tmp_path / "other.yaml").write_text("data: {url: other}\n")
    config = load_config(SweepConfig, str(files[0]), [f"run_from={tmp_path}/other.yaml"])
    assert (config.run.data.url, config.run.seed, config.run.schedule.num_steps) == ("other", 0, 88)


@pytest.mark.parametrize("in_run, in_sweep, on_line", list(itertools.product((0, 1), repeat=3)))
def test_of_three_places_the_nearest_to_the_user_wins(
    in_run: int, in_sweep: int, on_line: int, tmp_path: Path
) -> None:
    run, sweep = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    run.write_text("data: {url: shards}\n" + "seed: 1\n" * in_run)
    own = "run: {evaluation: {num_images: 50}" + ", seed: 2" * in_sweep + "}\n"
    sweep.write_text(f"name: a\nrun_from: {run}\nspace: [{SPACE}]\n{own}")
    nearest = max(in_run, 2 * in_sweep, 3 * on_line)
    assert load_config(SweepConfig, str(sweep), ["run.seed=3"] * on_line).run.seed == nearest


def test_a_run_file_that_is_not_there_is_reported_with_those_that_are(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[1].rename(tmp_path / "moved.yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml: no such file; here are: .*moved\.yaml"):
        load_config(SweepConfig, str(files[0]), [])


def test_what_is_wrong_in_a_run_file_is_reported_with_its_place(files: tuple[Path, Path]) -> None:
    files[1].write_text(RUN_FILE + "training: {stpes: 4, learning_rate: -1}\n")
    with pytest.raises(ConfigError, match="stpes") as refused:
        load_config(SweepConfig, str(files[0]), [])
    assert str(refused.value).splitlines() == [
        f"{files[1]}: run.training.stpes=4: no such key; did you mean run.training.steps?",
        f"{files[1]}: run.training.learning_rate is -1.0; it must be above 0",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_sweep_of_ours_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does a run with each of its choices, or with either end of its ranges."""
    monkeypatch.chdir(ROOT)  # run_from is relative to where one stands
    config = load_config(SweepConfig, str(path), [])
    for key, candidates in (item for branch in config.space for item in branch.items()):
        ends = [candidates[end] for end in ("low", "high")] if is_range(candidates) else candidates
        for value in ends:
            reported = flat(with_values(config.run, {key: value}, "trial"))[key]
            assert reported == (tuple(value) if isinstance(value, list) else value)

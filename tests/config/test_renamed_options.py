"""Options renamed since earlier versions: the old key means the same wherever a config is read."""

from pathlib import Path
from typing import Any, get_args

import pytest

from ddpm_ray.config import loading
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TRAITS, Task

RUN = {"name": "a", "data.url": "data"}
OFF = {"training.grid_every_steps": 0, "model.num_classes": 2}  # a classifier draws no images
SWEEP = {
    "name": "s",
    "run.data.url": "data",
    "run.evaluation.num_images": 9,
    "space": [{"seed": [1, 2]}],
    "stopping.kind": "none",
}
RENAMED: list[tuple[type[Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (RunConfig, RUN, {"model.kind": "unet"}, {"task": "denoiser", "model.network": "unet"}),
    (
        RunConfig,
        RUN | OFF,
        {"model.kind": "classifier"},
        {"task": "classifier", "model.network": "unet"},
    ),
    (
        RunConfig,
        RUN,
        {"evaluation.spectrum_every_steps": 2, "evaluation.spectrum_images": 32},
        {"evaluation.validation_every_steps": 2, "evaluation.validation_images": 32},
    ),
    (SweepConfig, SWEEP, {"pruning.max_useless_share": 0.3}, {"pruning.max_wasted_fraction": 0.3}),
    (
        SampleConfig,
        {},
        {"lead.weak_model": "runs/b", "lead.weak_scale": 3.0, "film": "a.gif"},
        {
            "guidance.autoguidance_model": "runs/b",
            "guidance.autoguidance_scale": 3.0,
            "gif": "a.gif",
        },
    ),
    (
        EvaluateConfig,
        {},
        {
            "lead.classifier": "runs/b",
            "lead.classifier_scale": 3.0,
            "lead.classifier_form": "score",
        },
        {
            "guidance.classifier": "runs/b",
            "guidance.classifier_scale": 3.0,
            "guidance.classifier_form": "score",
        },
    ),
]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return tree


@pytest.mark.parametrize("kind, others, before, now", RENAMED)
def test_a_former_key_means_the_same_in_files_on_the_command_line_and_in_saved_configs(
    kind: type[Any],
    others: dict[str, Any],
    before: dict[str, Any],
    now: dict[str, Any],
    tmp_path: Path,
) -> None:
    meant = loading.load_config(
        kind, None, [f"{key}={value}" for key, value in (others | now).items()]
    )
    old = others | before
    former = [f"{key}={value}" for key, value in old.items()]
    assert loading.load_config(kind, None, former) == meant
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"{key}: {value!r}\n" for key, value in old.items()))
    assert loading.load_config(kind, str(file), []) == meant
    assert loading.from_dict(kind, nested(old)) == meant
    assert set(now) <= set(loading.flat(meant))
    assert not set(before) & set(loading.flat(meant))


def test_every_task_says_what_its_models_can_do() -> None:
    assert set(TRAITS) == set(get_args(Task))

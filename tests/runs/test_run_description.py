"""A run's description names what a reader asks first, and commands that can be pasted."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm_ray.assembly import networks
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.evaluation.score_table import score_table, scores_alone
from ddpm_ray.runs import run_description
from ddpm_ray.tracking.run_note import MAX_NOTE
from tests.data.embedding_sets import random_embeddings, write_embeddings

DATASET: Any = SimpleNamespace(
    manifest=SimpleNamespace(
        image_shape=ImageShape(8, 8, 1),
        diffused_shape=ImageShape(8, 8, 1),
        samples=1797,
        label_names=tuple("0123456789"),
        codec="pixels",
        latent_shape=None,
        embedding_width=0,
    ),
    fingerprint="89d7628e765b" + "0" * 52,
)
SCORES = {
    "step": 4000,
    "metrics": {"eval/fid": 3.14159, "eval/fid_low": 3.0, "eval/fid_high": 3.25, "eval/kid": 0.5},
    "certificate": {
        "samples": {"images": 50000, "sampler": "ddim", "steps": 50, "eta": 0.0, "seed": 7},
        "reference": {"images": 1797},
    },
}


def described(scores: dict[str, Any], *keys: str, command: str = "ddpm-ray train digits") -> str:
    given = ["name=a", "data.url=/shards/digits", "model.groups=8", "model.base_channels=8"]
    given += ["model.channel_mults=[1,2]", "model.attention_factors=[2]"]
    config = load_config(RunConfig, None, [*given, *keys])
    return run_description.run_description(config, DATASET, "/my runs/a", None, command, scores)


def test_it_names_data_schedule_network_and_scores_with_protocol() -> None:
    text = described(SCORES, "schedule.kind=linear", "schedule.rescale=true")
    for fact in (
        "`/shards/digits`: 1797 images of 8x8x1, 10 labels, fingerprint 89d7628e765b",
        "linear rescaled, T = 1000",
        "eval/fid 3.142 [3, 3.25]; eval/kid 0.5",
        "50000 samples by ddim in 50 steps (eta 0, seed 7)",
        "`evaluation/step-00004000.json`",
        "**Continue** `ddpm-ray train digits`",
    ):
        assert fact in text
    assert text.startswith("**Scores** of step 4,000"), "MLflow's page folds all but three lines"
    assert len(text) < MAX_NOTE / 2


def test_it_says_what_an_encoded_set_holds(tmp_path: Path) -> None:
    embeddings = write_embeddings(tmp_path / "e", random_embeddings(8, 6), 8)
    assert "embeddings of width 6, of 8 images of 4x8x1, 7 labels" in run_description.data_line(
        "e", embeddings
    )


def test_it_names_the_sizes_of_the_network() -> None:
    assert "base_channels 8, channel_mults [1,2], blocks_per_level 2" in described({})
    keys = ["name=a", "data.url=b", "model.network=dit", "model.size=S/4", "model.depth=3"]
    config = load_config(RunConfig, None, keys)
    text = run_description.run_description(config, DATASET, "/a", None, "", {})
    assert "denoiser, dit, " in text
    assert "unconditional: patch_size 4, depth 3, hidden_size 384, heads 6" in text


def test_a_run_without_scores_says_nothing_of_them() -> None:
    assert "Scores" not in described({})
    assert "Protocol" not in described({"step": 1, "metrics": {"eval/fid": 1.0}})
    assert "by the command of the sweep" in described({}, command="")


@pytest.mark.parametrize(
    "program, job",
    [("jobs/train.py", ["python", "jobs/sample.py"]), ("/bin/ddpm-ray", ["ddpm-ray", "sample"])],
)
def test_the_next_command_has_the_form_of_this_one(
    program: str, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "digits", "name=my run"])
    own = shlex.split(run_description.own_command())
    assert own[-2:] == ["digits", "name=my run"]
    (line,) = [line for line in described({}).splitlines() if line.startswith("**Sample**")]
    command = shlex.split(line.partition("`")[2].rstrip("`"))
    assert command == [*job, "/my runs/a", "--out", "samples.png"]


def test_a_classifier_has_no_command_that_samples() -> None:
    keys = "task=classifier", "model.num_classes=10", "training.grid_every_steps=0"
    assert "**Sample**" not in described({}, *keys)


def test_each_score_stands_once_with_its_spread() -> None:
    metrics = {
        "eval/fid": 2.0,
        "eval/fid_low": 1.0,
        "eval/fid_high": 3.0,
        "eval/fid_infinity": 1.5,
        "eval/fid_infinity_error": 0.25,
        "eval/is": 9.0,
        "eval/is_deviation": 0.5,
        "eval/recall": 0.75,
    }
    assert score_table(metrics) == [
        ("eval/fid", "2", "[1, 3]"),
        ("eval/fid_infinity", "1.5", "± 0.25"),
        ("eval/is", "9", "± 0.5"),
        ("eval/recall", "0.75", ""),
    ]
    assert list(scores_alone(metrics)) == [name for name, _, _ in score_table(metrics)]


def test_the_parameters_are_counted_with_the_tokenizer_of_the_run() -> None:
    """Its text encoder has a vector for each token that there is, not for text.vocabulary.

    The driver describes the run on the meta device, with a tokenizer that has encoded nothing yet.
    """
    pytest.importorskip("tokenizers", reason="needs the extra [text]")
    tokenizer = Tokenizer.trained(["a cat"], 300, 6)
    keys = ["name=a", "data.url=b", "model.groups=2", "model.base_channels=4"]
    keys += ["model.channel_mults=[1,2]", "text.encoder=transformer", "text.length=6"]
    keys += ["text.width=8", "text.depth=1", "text.heads=2", "model.attention_factors=[2]"]
    config = load_config(RunConfig, None, keys)
    text = run_description.run_description(config, DATASET, "/a", tokenizer, "", {})
    network = networks.network(config, ImageShape(8, 8, 1), tokenizer=tokenizer)
    count = sum(weights.numel() for weights in network.parameters())
    assert f"denoiser, unet, {count:,} parameters" in text

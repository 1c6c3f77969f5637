"""The application that Ray Serve is given: its models, tokens, processes, and their number."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema

from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.runs.model_sources import ModelSources
from ddpm_ray.serving.ray_serve.application import TOKENS, build, named_uris, server_setup
from ddpm_ray.serving.ray_serve.autoscaling import QUEUED_S, QueuePolicy
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.training.checkpoint_folder import CheckpointError
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.noise import pack_noise
from tests.test_cascade_job import DIFFUSION, PRIOR, WIDTH, trained
from tests.training.test_loop import TINY_UNET

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's, as it imports
ROOT = Path(__file__).parents[2]
TOKEN = "t" * 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("serve")
    pack_noise(str(root / "data"), 8, 4)
    trained(root / "digits", str(root / "data"), *TINY_UNET)
    write_embeddings(root / "embeddings", random_embeddings(8, WIDTH), 8, captioned=True)
    held = {"image_encoder": {"url": "x", "sha256": "0" * 64}}
    trained(root / "prior", str(root / "embeddings"), *PRIOR, *DIFFUSION, held=held)
    return str(root / "digits")


def config(*options: str) -> ServeConfig:
    return load_config(ServeConfig, None, [*options])


def test_the_folder_of_a_run_is_pinned_to_its_checkpoint(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a process that starts later serves the same weights; names in the registry move."""
    monkeypatch.setenv(TOKENS, f"alice={TOKEN}")
    monkeypatch.setattr(ModelSources, "require_drawable", lambda *_: None)  # no registry here
    chosen = config("more_models=[faces=models:/faces@champion]")
    setup = server_setup(chosen, named_uris(chosen, run, ROOT), ROOT, is_local=True)
    assert list(setup.uris) == ["digits", "faces"]
    assert setup.uris["digits"].startswith(f"{run}/checkpoints/step-")
    assert setup.uris["faces"] == "models:/faces@champion"
    assert list(setup.clients) == ["alice"]
    assert TOKEN not in repr(setup)  # Ray shows what processes are given


@pytest.mark.parametrize(
    "options, problem",
    [
        (["more_models=[faces]"], "more_models has 'faces'; write NAME=MODEL_URI"),
        (["name=a b"], "name is 'a b'; take at most 64 letters"),
        (["name=x", "more_models=[x=a,y=b]"], "more_models: x is the name of two models"),
        (["replicas.min=2"], "replicas.max is 1; it must be at least replicas.min, 2"),
        (["batch.exact=true"], "batch.exact needs batch.width"),
        (["port=0"], "port is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_named(options: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        config(*options)


@pytest.mark.parametrize(
    "tokens, args, problem",
    [
        ("", {"model_uri": "{run}"}, "$DDPM_RAY_TOKENS is empty, and other machines can reach"),
        ("short", {"model_uri": "{run}"}, "$DDPM_RAY_TOKENS: token 1 is not NAME=TOKEN"),
        (TOKEN, {"model_uri": "{run}", "model": "x"}, "args has model; it has model_uri"),
        (TOKEN, {}, "args.model_uri is empty: name a model"),
        (TOKEN, {"model_uri": "/nowhere"}, "/nowhere: there is no such folder"),
        (TOKEN, {"model_uri": "{run}/../data"}, "this is a data set and not a model"),
        (TOKEN, {"model_uri": "{run}/../prior"}, "holds a prior, which draws no images"),
        (TOKEN, {"model_uri": "models:/nope@champion"}, "name=nope not found"),
        (
            TOKEN,
            {"model_uri": "{run}", "options": ["ports=1"]},
            "ports=1: no such key; did you",
        ),
        (
            TOKEN,
            {"model_uri": "{run}", "options": ["more_models=[digits=x]"]},
            "more_models: digits is the name of two models: set name",
        ),
    ],
)
def test_a_deployment_with_a_mistake_is_refused(
    tokens: str,
    args: dict[str, Any],
    problem: str,
    run: str,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_database: str,
) -> None:
    monkeypatch.setenv(TOKENS, tokens)
    given = {k: v.replace("{run}", run) if isinstance(v, str) else v for k, v in args.items()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)
    with pytest.raises((ConfigError, CheckpointError, TrackingError), match=re.escape(problem)):
        build(given)


def of_page() -> dict[str, Any]:
    """The config of `serve deploy` in docs/serving.md."""
    page = (ROOT / "docs/serving.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return dict(yaml.safe_load(block))


def of_manifest() -> dict[str, Any]:
    """The config in rayservice.yaml."""
    manifest = yaml.safe_load((ROOT / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    return dict(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


@pytest.mark.parametrize("content", [of_page, of_manifest])
def test_the_shipped_configs_are_those_of_ray_and_of_ours(
    content: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKENS, TOKEN)
    (application,) = ServeDeploySchema.model_validate(content()).applications
    module, _, name = str(application.import_path).partition(":")
    assert (module, name) == (build.__module__, build.__name__)
    args = dict(application.args)
    assert re.fullmatch("models:/.*@champion", args["model_uri"])
    assert build({**args, "model_uri": run})


@given(
    queued=st.lists(st.floats(0, 500), min_size=1, max_size=5),
    least=st.integers(1, 3),
    more=st.integers(0, 5),
)
def test_processes_come_with_the_accepted_work_and_go_one_by_one(
    queued: list[float], least: int, more: int
) -> None:
    policy, now = QueuePolicy(target_s=10.0), len(queued)
    context = SimpleNamespace(
        aggregated_metrics={QUEUED_S: dict(enumerate(queued))},
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=least + more,
        current_num_replicas=now,
    )
    number, _ = policy(context)
    assert least <= number <= least + more
    if number < least + more:
        assert sum(queued) <= 10.0 * number  # there is no need for another one
    assert number >= min(now - 1, least + more)
    context.aggregated_metrics = None  # nothing is reported yet
    assert policy(context)[0] >= least

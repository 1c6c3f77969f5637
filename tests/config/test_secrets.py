"""A config cannot run code, cannot read a secret, and holds none when it is saved or shown."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import (
    ENVIRONMENT,
    ConfigError,
    from_dict,
    load_config,
    to_yaml,
    with_values,
)
from ddpm_ray.config.run import RunConfig
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri

ROOT = Path(__file__).parents[2]
WHOLE = ("name=a", "data.url=shards")
SWEEP = ("name=a", "run.data.url=shards", "run.evaluation.num_images=8")
SECRETS = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "HF_TOKEN")
CANARY = "canary-5f3c"


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)


@pytest.mark.parametrize(
    "reference",
    [
        *(f"${{oc.env:{name}}}" for name in SECRETS),
        "${oc.env:HOME}${oc.env:AWS_SECRET_ACCESS_KEY}",
        "${ oc.env:AWS_SECRET_ACCESS_KEY}",
        "${oc.env: AWS_SECRET_ACCESS_KEY}",
        "${oc.env:'AWS_SECRET_ACCESS_KEY'}",
        "${oc.env:HOMEAWS_SECRET_ACCESS_KEY,x}",
        "${oc.env:${data.cache_dir}}",
        "${oc.env:HOME,${oc.env:AWS_SECRET_ACCESS_KEY}}",
        "${oc.decode:'1'}",
        "${oc.create:'{a: 1}'}",
        "${oc.select:name}",
        "${oc.dict.keys:data}",
        "${eval:1+1}",
        "\\${oc.env:AWS_SECRET_ACCESS_KEY}",  # escaped once, and read again by the next process
    ],
)
def test_nothing_but_listed_names_and_other_keys_is_looked_up(
    reference: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"name: a\nstorage: {reference!r}\ndata: {{url: shards}}\n")
    line = r"storage=.*a value may refer to another key, .* or to \$\{oc\.env:NAME\} where NAME is"
    with pytest.raises(ConfigError, match=line) as refused:
        load_config(RunConfig, str(file), [])
    assert CANARY not in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="a: storage="):
        with_values(load_config(RunConfig, None, [*WHOLE]), {"storage": reference}, "a")
    file.write_text(f"space: [{{data.cache_dir: [{reference!r}]}}]\n")
    with pytest.raises(ConfigError, match=r"space=.*a value may refer"):
        load_config(SweepConfig, str(file), list(SWEEP))


def test_listed_names_and_other_keys_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_RAY_HOME", "/data")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = (
        "storage=${oc.env:DDPM_RAY_HOME}/runs/${name}",
        "cluster.address=${oc.env:RAY_ADDRESS,auto}",
    )
    config = load_config(RunConfig, None, [*WHOLE, *given])
    assert (config.storage, config.cluster.address) == ("/data/runs/a", "auto")


def test_no_listed_name_is_one_of_a_secret() -> None:
    words = ("KEY", "SECRET", "PASSWORD", "TOKEN", "CREDENTIAL")
    assert not [name for name in ENVIRONMENT if any(word in name for word in words)]


def test_a_saved_config_looks_nothing_up() -> None:
    """Whoever can write the storage can write a checkpoint's config; it is read by workers."""
    for edited in (
        {"name": "${oc.env:AWS_SECRET_ACCESS_KEY}"},
        {"data": {"url": "s3://mine/${oc.env:HF_TOKEN}"}},
        {"storage": "${data.url}"},
    ):
        with pytest.raises(ConfigError, match=r"a saved config holds \$\{...\}: it was edited"):
            from_dict(RunConfig, edited)


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.mkdir [FOLDER]",
        "name: !!python/name:os.system",
        "name: !!python/object/new:os.mkdir [FOLDER]",
        "!!python/object/apply:os.mkdir [FOLDER]",
    ],
)
def test_a_tag_of_yaml_makes_no_object(text: str, tmp_path: Path) -> None:
    made, file = tmp_path / "made", tmp_path / "run.yaml"
    file.write_text(text.replace("FOLDER", str(made)))
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        load_config(RunConfig, str(file), list(WHOLE))
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        load_config(RunConfig, None, [*WHOLE, f"name={file.read_text().removeprefix('name: ')}"])
    assert not made.exists()


@pytest.mark.parametrize("key", ["_target_", "model._target_", "data._partial_", "__class__"])
def test_a_key_that_names_code_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}='os.system': no such key"):
        load_config(RunConfig, None, [*WHOLE, f"{key}=os.system"])
    with pytest.raises(ConfigError, match=f"space.{key}='os.system': no such key"):
        load_config(SweepConfig, None, [*SWEEP, f"space=[{{{key}: [os.system]}}]"])


PASSWORD = f"http://me:{CANARY}@mlflow.example.com"
KEYS = f"s3://AKIA:{CANARY}/{CANARY}@bucket/x"


@pytest.mark.parametrize(
    "kind, given",
    [
        (RunConfig, [*WHOLE, f"tracking.uri={PASSWORD}"]),
        (RunConfig, [*WHOLE, f"storage={KEYS}"]),
        (RunConfig, ["name=a", f"data.url={KEYS}"]),
        (RunConfig, [*WHOLE, f"evaluation.weights=https://host/w.pth?X-Amz-Signature={CANARY}"]),
        (RunConfig, [*WHOLE, "tracking.uri=${oc.env:MLFLOW_TRACKING_URI}"]),
        (SweepConfig, [*SWEEP, f"run.tracking.uri={PASSWORD}", "space=[{seed: [1]}]"]),
        (SweepConfig, [*SWEEP, f"space=[{{data.cache_dir: [x, '{KEYS}']}}]"]),
        (EvaluateConfig, [f"data_url={KEYS}"]),
        (PackConfig, [f"url={PASSWORD}"]),
        (DoctorConfig, [f"tracking_uri={PASSWORD}"]),
        (
            DrillConfig,
            ["run.name=a", "run.data.url=b", "faults=[kill@commit]", f"run.storage={KEYS}"],
        ),
        # An error in the rest of the config must not show the secret either.
        (RunConfig, [*WHOLE, f"trackng.uri={PASSWORD}"]),
        (RunConfig, [*WHOLE, f"cluster.num_workers={PASSWORD}"]),
        (RunConfig, [*WHOLE, f"{PASSWORD}"]),
        (RunConfig, [*WHOLE, f"tracking.uri=[{PASSWORD}"]),
        (SampleConfig, [f"sampling.sampler={PASSWORD}"]),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_shown(
    kind: type[Any], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", PASSWORD)
    with pytest.raises(ConfigError, match=r"^command line: .*\*\*\*") as refused:
        load_config(kind, None, given)
    assert CANARY not in str(refused.value)


def test_neither_is_one_in_the_variable_that_runs_are_tracked_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", PASSWORD)
    with pytest.raises(ConfigError, match=r"\$MLFLOW_TRACKING_URI is http://\*\*\*@mlflow"):
        resolve_tracking_uri(tmp_path)


def job(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and all that was said, of a job as a person runs it."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("jobs/train.py", "conf/train/digits.yaml", "--print-config", f"tracking.uri={PASSWORD}"),
        ("jobs/sample.py", KEYS, "--out", "x.png"),
        ("jobs/sample.py", "runs/a", "--out", KEYS),
        ("jobs/evaluate.py", KEYS),
        ("jobs/pack_shards.py", KEYS, "data/x"),
        ("jobs/pack_shards.py", "digits", KEYS),
    ],
)
def test_a_job_ends_with_2_and_says_what_to_do(words: tuple[str, ...]) -> None:
    code, said = job(*words)
    assert code == 2, said
    assert CANARY not in said
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME" in said


def test_the_config_that_is_shown_holds_no_secret() -> None:
    environment = dict.fromkeys(SECRETS, CANARY)
    code, said = job("jobs/train.py", "conf/train/digits.yaml", "--print-config", **environment)
    assert code == 0, said
    assert "storage: runs" in said
    assert CANARY not in said
    assert CANARY not in to_yaml(load_config(RunConfig, None, [*WHOLE]))

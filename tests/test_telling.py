"""What may be told: no secret of a URL, no character that a terminal or a log would act on."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.cluster.tracking import TrackingError
from ddpm_ray.data.image_files import BadImageError
from ddpm_ray.data.shards import DatasetError, ShardCorruptError
from ddpm_ray.data.storage import StorageError, read_bytes
from ddpm_ray.data.verified import DamagedError
from ddpm_ray.telling import has_secret, printable, redacted, told
from ddpm_ray.training.checkpoints import CheckpointError
from ddpm_ray.training.divergence import DivergedError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

WORDS = st.text("abcXYZ019-_+=.", min_size=1, max_size=12)


@given(st.sampled_from(["s3", "http", "https", "postgresql+psycopg2"]), WORDS, WORDS, WORDS)
def test_no_password_of_a_url_is_told(scheme: str, user: str, password: str, host: str) -> None:
    secret = f"PASS{password}WORD"
    for url in (f"{scheme}://{user}:{secret}@{host}/a", f"{scheme}://:{secret}@{host}:5000"):
        shown = told(f"no answer from '{url}', tried twice")
        assert secret not in shown
        assert host in shown
        assert has_secret(url)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("s3://AKIA:wJal/rXUt+nF@bucket/x", "s3://***@bucket/x"),  # keys of S3 may hold a slash
        ("s3://key:12345@bucket", "s3://***@bucket"),  # digits, and yet no port
        ("http://a:b@c@host/", "http://***@host/"),
        ("https://ghp_token@host/x", "https://***@host/x"),
        ("simplecache::s3://k:s@bucket/x", "simplecache::s3://***@bucket/x"),
        ("https://b.s3/x?X-Amz-Signature=ab12&n=1", "https://b.s3/x?X-Amz-Signature=***&n=1"),
        ("https://b.blob/x?sv=1&sig=ab%3D", "https://b.blob/x?sv=1&sig=***"),
        ("https://host/x?access_token=ab", "https://host/x?access_token=***"),
    ],
)
def test_each_place_of_a_secret_is_known(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown
    assert has_secret({"deep": [{"er": (url,)}]})
    assert has_secret({url: 1})


@pytest.mark.parametrize(
    "harmless",
    [
        "http://host:5000/x@y", "http://[::1]:5000", "sqlite:////tmp/a:b@c/mlflow.db",
        "abfs://container@account.dfs.core.windows.net/x", "models:/name@champion",
        "/data/a:b@c", "s3://bucket/key", "http://host:5000: no answer (me@host)", "",
    ],
)  # fmt: skip
def test_what_holds_no_secret_stays_as_it_is(harmless: str) -> None:
    assert told(harmless) == harmless
    assert not has_secret([harmless, 1, None, {"a": 2.5}])


@given(st.text())
def test_a_name_is_one_line_that_a_terminal_only_shows(name: str) -> None:
    shown = printable(name)
    assert all(char.isprintable() for char in shown)
    shown.encode()  # no half of a pair of surrogates
    assert len(shown.splitlines()) <= 1
    if name.isprintable():
        assert shown == name


def test_escapes_are_spelt_out() -> None:
    name = "a\x1b[2J\r\nerror: all is lost\u202egpj.exe\x00\udcff"
    assert printable(name) == r"a\x1b[2J\r\nerror: all is lost\u202egpj.exe\x00\udcff"


EVIL = "../../x\x1b[2J\nerror: disk full\u202e"
PLACE = f"s3://key:hush/hush@bucket/{EVIL}"
ERRORS: list[Exception] = [
    BadImageError(PLACE, f"not readable ({EVIL})", "repair it"),
    DatasetError(PLACE, f"some samples have a label and {EVIL} has none", "give all one"),
    StorageError(PLACE, f"no answer ({PLACE})", "wait"),
    ShardCorruptError(PLACE, "ab" * 32, "cd" * 32, 5),
    DamagedError(PLACE, "ab" * 32, "cd" * 32),
    CheckpointError(PLACE, EVIL, "restore it"),
    DivergedError(3, float("nan"), 1.0, [EVIL, EVIL]),
    TrackingError(PLACE, f"MLflow does not answer ({PLACE})", "start it"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_each_error_that_names_data_or_a_place_is_one_harmless_line(error: Exception) -> None:
    assert str(error).isprintable()
    assert "hush" not in str(error)
    assert isinstance(error, DivergedError) or "s3://***@bucket" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_storage_does_not_ask_with_a_password_in_the_address() -> None:
    with pytest.raises(StorageError, match=r"s3://\*\*\*@bucket.*: not asked; a password or"):
        read_bytes(PLACE)


def test_a_log_line_of_a_job_is_one_line() -> None:
    script = (
        "import logging, sys\nfrom ddpm_ray import command_line\n"
        "from ddpm_ray.job_config import SampleConfig\n"
        "evil = sys.argv.pop()\n"
        "def job(*_):\n"
        "    logging.getLogger('ddpm_ray.x').warning('read %s', evil)\n"
        "    raise RuntimeError(evil)\n"
        "sys.exit(command_line.main('', SampleConfig, job))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, PLACE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    log, error = done.stderr.splitlines()
    assert log.startswith("read s3://***@bucket/../../x\\x1b[2J\\nerror: disk full\\u202e")
    assert error.startswith("error: s3://***@bucket/../../x\\x1b[2J error: disk full\\u202e (Run")

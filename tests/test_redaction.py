"""Text for logs: no secret of a URL, no character that a terminal or a log would act on."""

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing.image_files import BadImageError
from ddpm_ray.data.shards import ShardCorruptError
from ddpm_ray.redaction import counted, has_secret, printable, redacted, sanitize
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.storage.object_store import read_bytes
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.divergence_guard import DivergedError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

WORDS = st.text("abcXYZ019-_+=.", min_size=1, max_size=12)


@given(st.sampled_from(["s3", "http", "https", "postgresql+psycopg2"]), WORDS, WORDS, WORDS)
def test_no_password_of_a_url_is_shown(scheme: str, user: str, password: str, host: str) -> None:
    secret = f"PASS{password}WORD"
    for url in (f"{scheme}://{user}:{secret}@{host}/a", f"{scheme}://:{secret}@{host}:5000"):
        shown = sanitize(f"no answer from '{url}', tried twice")
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
        ("https://host/x#access_token=ab&n=1", "https://host/x#access_token=***&n=1"),
        ("https://g/b/o?X-Goog-Credential=a&n=1", "https://g/b/o?X-Goog-Credential=***&n=1"),
        ("https://h/p?a=1&amp;sig=ab", "https://h/p?a=1&amp;sig=***"),
        ("https://h/p?client%5Fsecret=ab", "https://h/p?client%5Fsecret=***"),
        ("postgresql://h/db?user=u&sslpassword=ab", "postgresql://h/db?user=u&sslpassword=***"),
        ("https://g/v3/f?alt=media&key=AIza" + "x" * 35, "https://g/v3/f?alt=media&key=***"),
        ("https://h/p?state=eyJhbGciOiJI.eyJzdWIi.c2ln", "https://h/p?state=***"),
    ],
)
def test_each_place_of_a_secret_is_known(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown
    assert has_secret({"deep": [{"er": (url,)}]})
    assert has_secret({url: 1})


SECRET_NAMES = (
    "X-Goog-Signature",
    "X-Goog-Credential",
    "X-Amz-Security-Token",
    "AWSAccessKeyId",
    "Signature",
    "client_secret",
    "refresh_token",
    "id_token",
    "access_token",
    "session_token",
    "sas_token",
    "token",
    "api-key",
    "api_key",
    "apikey",
    "passwd",
    "password",
    "pwd",
    "jwt",
    "bearer",
    "sslpassword",
    "private_key",
    "account_key",
    "secret_access_key",
    "sig",
    "authorization",
    "ssl_key_passphrase",
    "sessionid",
    "subscription-key",
    "client_assertion",
)


@given(
    st.sampled_from(SECRET_NAMES),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(["_", "-", ".", "%5F", "%2D", ""]),
    st.sampled_from("?&#;"),
    st.sampled_from(["s3", "https", "postgresql", "abfs"]),
    WORDS,
)
def test_no_parameter_that_is_named_as_a_secret_is_shown(
    name: str, case: Callable[[str], str], separator: str, before: str, scheme: str, word: str
) -> None:
    """Whatever its case and separators, and wherever in the URL it stands."""
    secret, spelt = f"SECRET{word}", separator.join(re.split("[_-]", case(name)))
    url = f"{scheme}://host/path?n=1{before}{spelt}={secret}&m=2"
    assert has_secret(url)
    shown = redacted(f"no answer from {url} today")
    assert shown == f"no answer from {scheme}://host/path?n=1{before}{spelt}=***&m=2 today"
    assert redacted(shown) == shown


@given(
    st.sampled_from(
        [
            "tokenizer",
            "keyframes",
            "key",
            "max_tokens",
            "signature_version",
            "design",
            "secretary",
            "bypass",
            "author",
            "assign",
            "passes",
            "sslkey",
            "sslrootcert",
            "format",
            "versionId",
            "endpoint",
            "client_id",
            "session_timeout",
            "credentials_file",
            "auth_type",
            "sv",
            "se",
        ]
    ),
    WORDS,
)
def test_a_parameter_that_only_resembles_one_stays(name: str, value: str) -> None:
    assert not has_secret(url := f"https://host/path?{name}={value}#{name}={value}")
    assert redacted(url) == url


@pytest.mark.parametrize(
    "harmless",
    [
        "http://host:5000/x@y",
        "http://[::1]:5000",
        "sqlite:////tmp/a:b@c/mlflow.db",
        "abfs://container@account.dfs.core.windows.net/x",
        "models:/name@champion",
        "/data/a:b@c",
        "s3://bucket/key",
        "http://host:5000: no answer (me@host)",
        "",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(harmless: str) -> None:
    assert sanitize(harmless) == harmless
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
    with pytest.raises(StorageError, match=r"s3://\*\*\*@bucket.*: refused; a password or"):
        read_bytes(PLACE)


def test_a_log_line_of_a_job_is_one_line() -> None:
    script = (
        "import logging, sys\nfrom ddpm_ray.cli.job import Job\n"
        "from ddpm_ray.cli.main import main\n"
        "from ddpm_ray.config.jobs.sample import SampleConfig\n"
        "evil = sys.argv.pop()\n"
        "def job(*_):\n"
        "    logging.getLogger('ddpm_ray.x').warning('read %s', evil)\n"
        "    raise RuntimeError(evil)\n"
        "sys.exit(main(Job('sample', '', SampleConfig, job)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, PLACE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    log, error = done.stderr.splitlines()
    assert log.startswith("read s3://***@bucket/../../x\\x1b[2J\\nerror: disk full\\u202e")
    assert error.startswith("error: s3://***@bucket/../../x\\x1b[2J error: disk full\\u202e (Run")


@pytest.mark.parametrize(
    "number, noun, plural, expected",
    [
        (0, "row", "", "0 rows"),
        (1, "worker", "", "1 worker"),
        (2, "worker", "", "2 workers"),
        (1.0, "GPU", "", "1 GPU"),
        (0.5, "GPU", "", "0.5 GPUs"),
        (1, "class", "classes", "1 class"),
        (10, "class", "classes", "10 classes"),
        (1234567, "row", "", "1234567 rows"),
    ],
)
def test_a_count_agrees_with_its_noun(number: float, noun: str, plural: str, expected: str) -> None:
    assert counted(number, noun, plural) == expected


PLURALS = re.compile(
    r"(?:workers|samples|images|rows|trials|nodes|checkpoints|shards|GPUs|CPUs|labels|classes|"
    r"numbers|hashes|files|downloads|vectors|runs|times)\b"
)
NEVER_ONE = {  # no number of things, or one that is above 1 wherever the line is written
    "image_shape",
    "suffix",
    "_named(open_to)",
    "folder",
    "num_images",
    "report.skipped",
    "channels",
    "len(labels)",
    "len(images)",
    "len(names)",
    "len(trials)",
    "len(outcome.trials)",
    "len(trials) - len(rows)",
}


def test_no_line_puts_a_plural_behind_a_number_that_may_be_one() -> None:
    """Such a line says `1 workers`; `counted` does not."""
    found = []
    for path in [*(ROOT / "ddpm_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        for text in ast.walk(ast.parse(path.read_text())):
            if isinstance(text, ast.Constant) and isinstance(line := text.value, str):
                found += [f"{path.name}: {line}"] * bool(re.search(rf"%d {PLURALS.pattern}", line))
            if not isinstance(text, ast.JoinedStr):
                continue
            for value, behind in zip(text.values, text.values[1:], strict=False):
                if not isinstance(value, ast.FormattedValue) or not isinstance(
                    behind, ast.Constant
                ):
                    continue
                shown = ast.unparse(value.value)
                if shown in NEVER_ONE or shown.isupper() or not isinstance(behind.value, str):
                    continue
                if re.match(rf" (?:[a-z]+ )?{PLURALS.pattern}(?!/)", behind.value):
                    found.append(f"{path.name}: {{{shown}}}{behind.value}")
    assert not found, found

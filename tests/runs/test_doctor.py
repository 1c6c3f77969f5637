"""The doctor: a healthy set-up passes, each broken part is one line with its remedy, in time."""

import contextlib
import errno
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.runs.doctor import checks, doctor, local_checks
from ddpm_ray.runs.doctor.checks import Finding, clock
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri
from ddpm_ray.training.writer_lease import Lease

ROOT = Path(__file__).parents[2]
UseS3 = Callable[[str, str], str]
seconds = st.floats(0, 1e6)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


def job(folder: Path, *overrides: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and stderr of the job as a person runs it."""
    command = [sys.executable, str(ROOT / "jobs/doctor.py"), *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        return int(free_socket.getsockname()[1])


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {one.check: one for one in findings}


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers with `request.param`: a status, and seconds its clock is ahead."""
    status, ahead_s = request.param

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string((timestamp or time.time()) + ahead_s)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.timeout(240)
def test_a_healthy_set_up_passes_and_nothing_is_left(
    tmp_path: Path, s3: str, mlflow_server: int
) -> None:
    place, uri = f"{s3}/{tmp_path.name}", f"http://127.0.0.1:{mlflow_server}"
    code, report, reported = job(
        tmp_path, f"storage={place}", f"tracking_uri={uri}", "timeout_s=60"
    )
    assert code == 0, reported
    assert report["failed"] == []
    found = {one["check"]: one for one in report["findings"]}
    assert {one["verdict"] for check, one in found.items() if check != "GPUs"} == {"ok"}
    assert f"server {version('mlflow')}" in found["MLflow"]["found"]
    assert "ddpm-ray does not need it" in found["conditional put"]["found"]  # rclone ignores it
    assert all(place in found["clocks"]["found"] for place in ("bucket", "MLflow"))
    with pytest.raises(StorageError, match="no such file or object"):
        object_store.list_files(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(240)
def test_each_broken_part_is_one_line_with_its_remedy(
    tmp_path: Path, s3_server: str, use_s3: UseS3
) -> None:
    bucket = use_s3(s3_server, "wrong")
    dead = free_port()
    code, report, reported = job(
        tmp_path,
        f"storage={bucket}/runs",
        f"tracking_uri=http://127.0.0.1:{dead}",
        f"address=127.0.0.1:{dead}",
        "timeout_s=60",
    )
    assert code == 1
    assert report["failed"] == ["storage", "MLflow", "Ray"]
    found = {one["check"]: one for one in report["findings"]}
    assert "access denied" in found["storage"]["found"]
    assert "AWS_SECRET_ACCESS_KEY" in found["storage"]["remedy"]
    assert "refused" in found["MLflow"]["found"]
    assert "start it" in found["MLflow"]["remedy"]
    assert "refused" in found["Ray"]["found"]
    assert "ray start --head" in found["Ray"]["remedy"]
    assert reported.splitlines()[-1].startswith("error: 3 of ")
    assert "Traceback" not in reported


@pytest.mark.timeout(60)
def test_servers_that_never_answer_are_reported_in_time(
    tmp_path: Path, silent: int, use_s3: UseS3
) -> None:
    bucket, begun = use_s3(f"http://127.0.0.1:{silent}", "secret"), time.monotonic()
    code, report, reported = job(
        tmp_path,
        f"storage={bucket}/runs",
        f"tracking_uri=http://127.0.0.1:{silent}",
        f"address=127.0.0.1:{silent}",
        "timeout_s=12",  # 5 s of it are MLflow's, the rest its start
    )
    assert time.monotonic() - begun < 20  # that the S3 client alone tries for a minute
    assert code == 1, reported
    assert report["failed"] == ["storage", "MLflow", "Ray"]
    found = {one["check"]: one["found"] for one in report["findings"]}
    assert found["storage"] == f"{bucket}/runs: timed out after timeout_s=12"
    assert found["Ray"] == f"127.0.0.1:{silent}: timed out after timeout_s=12"
    assert "timed out" in found["MLflow"]


def test_a_local_ray_that_is_not_checked_in_time_is_no_matter_of_a_head_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = by_check(doctor.examine(DoctorConfig(storage=str(tmp_path), timeout_s=0), tmp_path))
    assert late["Ray"].found == "timed out after timeout_s=0"
    assert "timeout_s=60" in late["Ray"].remedy
    assert "head" not in late["Ray"].remedy
    monkeypatch.setenv("RAY_ADDRESS", "far:6379")
    late = by_check(doctor.examine(DoctorConfig(storage=str(tmp_path), timeout_s=0), tmp_path))
    assert late["Ray"].found == "far:6379: timed out after timeout_s=0"
    assert "on the head" in late["Ray"].remedy


def test_a_local_ray_on_a_machine_without_gpus_is_checked_without_ray_and_torch() -> None:
    script = (
        "import sys, pathlib; from ddpm_ray.runs.doctor import local_checks as local;"
        "local.DEVICES = pathlib.Path('/nowhere'); found = list(local.local_ray());"
        "print([one.found for one in found], sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip().endswith("'none: training on CPUs'] []"), done.stderr


@pytest.mark.parametrize("devices, verdict", [(["nvidia0", "nvidiactl"], "fail"), (["dxg"], "ok")])
def test_gpus_of_a_machine_are_those_that_torch_sees(
    devices: list[str], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(local_checks, "DEVICES", tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert by_check(list(local_checks.local_ray()))["GPUs"].verdict == verdict


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray of one node that claims 99 GPUs, without authentication."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    script = (
        "import ray, sys; c = ray.init(address='local', num_cpus=1, num_gpus=99);"
        "print(c.address_info['gcs_address'], flush=True); sys.stdin.read(); ray.shutdown()"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.communicate(timeout=30)
    head.kill()
    head.wait()


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_cluster_is_asked_node_by_node(cluster: str, tmp_path: Path) -> None:
    config = DoctorConfig(storage=str(tmp_path), address=cluster, timeout_s=100)
    found = by_check(doctor.examine(config, tmp_path))
    assert found["Ray"].found == f"{cluster}: nodes 1, CPUs 1, GPUs 99"
    assert found["State API"].verdict == "ok", found["State API"]
    assert found["nodes"].verdict == "ok", found["nodes"]
    assert found["GPUs"].verdict == "fail"
    assert "Ray 99" in found["GPUs"].found
    loopback = cluster.startswith("127.")
    assert found["authentication"].verdict == ("ok" if loopback else "warn")
    assert found["clocks"].verdict == "ok", found["clocks"]
    assert found["storage"].verdict == "warn"  # a folder of this machine
    assert found["MLflow"].verdict == "warn"


@pytest.mark.parametrize("stub", [(200, -60)], indirect=True)
def test_a_clock_that_is_off_is_a_failure(stub: str, tmp_path: Path) -> None:
    config = DoctorConfig(storage=str(tmp_path), tracking_uri=stub, timeout_s=60)
    finding = by_check(doctor.examine(config, tmp_path))["clocks"]
    assert finding.verdict == "fail"
    assert "MLflow is -5" in finding.found or "MLflow is -60" in finding.found
    assert "chrony" in finding.remedy


@pytest.mark.parametrize("stub", [(401, 0), (404, 0)], indirect=True)
def test_a_server_that_refuses_is_reported_with_the_way_in(stub: str, tmp_path: Path) -> None:
    (finding,) = checks.mlflow_answers(DoctorConfig(tracking_uri=stub), tmp_path)
    assert isinstance(finding, Finding)
    assert finding.verdict == "fail"
    assert ("MLFLOW_TRACKING_PASSWORD" in finding.remedy) == ("401" in finding.found)


def test_a_password_in_the_address_is_refused_as_a_run_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@mlflow.example.com")
    (finding,) = checks.mlflow_answers(DoctorConfig(), tmp_path)
    assert isinstance(finding, Finding)
    assert finding.verdict == "fail"
    assert "MLFLOW_TRACKING_PASSWORD" in finding.remedy
    assert "hush" not in finding.found


def test_a_database_is_tried_where_runs_would_make_it(tmp_path: Path, mlflow_database: str) -> None:
    (finding,) = checks.mlflow_answers(DoctorConfig(), tmp_path)
    assert isinstance(finding, Finding)
    assert resolve_tracking_uri(tmp_path).endswith(finding.found.partition(":")[0])
    broken = tmp_path / "mlflow.db"
    broken.write_bytes(b"not a database, and long enough to be seen as none" * 10)
    (finding,) = checks.mlflow_answers(DoctorConfig(), tmp_path)
    assert isinstance(finding, Finding)
    assert finding.verdict == "fail"
    assert "not a database" in finding.found


@pytest.mark.parametrize(
    "answer, verdict, says",
    [
        ("honours", "ok", "honoured"),
        ("ignores", "ok", "ignored by this store; ddpm-ray does not need it"),
        ("refuses", "fail", "refused (a header is not implemented), and each start of a run needs"),
    ],
)
def test_a_bucket_may_ignore_the_condition_and_not_refuse_it(
    answer: str, verdict: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MemoryFileSystem.pipe_file

    def pipe_file(bucket: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and answer == "refuses":
            raise NotImplementedError("a header is not implemented")
        put(bucket, path, value, mode if answer == "honours" else "overwrite")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    place = f"memory://{tmp_path.name}"
    found = checks.storage_keeps(DoctorConfig(storage=place), tmp_path)
    by_name = by_check([one for one in found if isinstance(one, Finding)])
    assert by_name["storage"].verdict == "ok"
    assert by_name["conditional put"].verdict == verdict
    assert says in by_name["conditional put"].found
    assert object_store.file_names(place) == []
    if verdict == "fail":
        with pytest.raises(StorageError, match="a header is not implemented"):
            Lease.first(place)


@pytest.mark.parametrize("number, verdict", [(errno.EPERM, "ok"), (errno.EACCES, "fail")])
def test_a_folder_is_tried_by_a_new_file_as_a_lease_is(
    number: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the name is taken the system says so, whether it has hard links or not."""

    def link(source: Path, target: Path) -> None:
        raise FileExistsError if target.exists() else OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    found = list(checks.storage_keeps(DoctorConfig(storage=str(tmp_path)), tmp_path))
    assert [one.verdict for one in found if isinstance(one, Finding)] == ["ok", verdict]
    assert list(tmp_path.iterdir()) == []
    with contextlib.nullcontext() if verdict == "ok" else pytest.raises(StorageError, match="not"):
        Lease.first(str(tmp_path))


@pytest.mark.parametrize(
    "name, number, verdict",
    [("torch", "2.13.9+cu130", "ok"), ("torch", "2.12.1", "fail"), ("ray", "2.61.0", "fail")],
)
def test_packages_are_held_against_pyproject(
    name: str, number: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "version", lambda n: number if n == name else version(n))
    (finding,) = checks.packages()
    assert finding.verdict == verdict, finding
    assert f"{name} {number.partition('+')[0]}" in finding.found


@given(seconds, seconds, st.floats(0, 1), st.floats(-1e6, 1e6))
def test_a_clock_is_never_blamed_for_the_way(
    before: float, way_s: float, share: float, ahead_s: float
) -> None:
    """A right clock shows 0 however long the answer takes; a wrong one is off by what is told."""
    after, true = before + way_s, before + share * way_s
    assert clock("a", true, before, after).ahead_s == pytest.approx(0, abs=1e-6)
    assert clock("a", float(int(true)), before, after, 1).ahead_s == pytest.approx(0, abs=1e-6)
    reported = clock("a", true + ahead_s, before, after).ahead_s
    assert reported * ahead_s >= 0 or reported == pytest.approx(0, abs=1e-6)
    assert abs(ahead_s) - way_s - 1e-6 <= abs(reported) <= abs(ahead_s) + 1e-6

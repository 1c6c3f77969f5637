"""The HTTP interface: by OpenAI's own client and by plain requests, all in this process."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

import numpy as np
import openai
import pytest
import requests
from fastapi import FastAPI
from openai import OpenAI
from PIL import Image

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.http.access import Access, clients_of
from ddpm_ray.serving.http.app import build_app
from ddpm_ray.serving.http.following import TableLostError
from ddpm_ray.serving.http.http_server import HttpSettings
from ddpm_ray.serving.http.schemas import chat_tools
from ddpm_ray.serving.image_service import ServiceSettings
from ddpm_ray.serving.job_entry import JobKey, JobReport, Submitted
from ddpm_ray.serving.limits import TokenBucket
from ddpm_ray.serving.orders import Draw, Event, ImageOrder, PreviewFiles, ReplicaLostError
from ddpm_ray.serving.table_settings import TableSettings
from tests.limits import ENDS_S
from tests.serving.counted_model import counted, held
from tests.serving.local_server import LocalJobs, local_server, served
from tests.serving.test_image_service import KNOWN, PIXELS, opened, png

T = TypeVar("T")
SETTINGS = {"seed": 3, "steps": 5}


@pytest.fixture
def server(model: TrainedModel) -> Iterator[tuple[str, LocalJobs]]:
    table = TableSettings(lease_s=1e6)  # no job ends by that: a client that leaves says so
    with local_server(served({"digits": model}), table=table) as started:
        yield started


@pytest.fixture
def url(server: tuple[str, LocalJobs]) -> str:
    return server[0]


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with openai_client(url) as made:
        yield made


def openai_client(url: str, token: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}v1", api_key=token, max_retries=0, timeout=ENDS_S)


def decoded(text: str | None) -> np.ndarray:
    assert text is not None
    return opened(base64.b64decode(text))


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found.astype(int) - wanted.squeeze()).max() <= 1)


def wait_until(holds: Any) -> None:
    until_s = time.monotonic() + ENDS_S
    while not holds():
        assert time.monotonic() < until_s
        threading.Event().wait(0.005)


def test_openais_client_draws_images(client: OpenAI, model: TrainedModel) -> None:
    made = client.images.generate(prompt="", n=2, extra_body=SETTINGS)
    assert made.data is not None
    for one, wanted in zip(made.data, model.sample(2, seed=3, steps=5), strict=True):
        assert near(decoded(one.b64_json), wanted)
    facts = (made.data[1].model_extra or {})["ddpm_ray"]
    assert facts["model"] == "digits"
    assert facts.items() >= {"kind": "generation", "index": 1, **SETTINGS}.items()
    assert [one.id for one in client.models.list()] == ["digits"]
    assert client.models.retrieve("digits").id == "digits"
    with pytest.raises(openai.NotFoundError, match="there is no model 'cats'"):
        client.models.retrieve("cats")


def test_openais_client_reads_a_stream_of_previews(client: OpenAI) -> None:
    stream = client.images.generate(prompt="", stream=True, partial_images=2, extra_body=SETTINGS)
    events = [*stream]
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    whole = client.images.generate(prompt="", extra_body=SETTINGS).data
    assert whole is not None
    assert events[-1].b64_json == whole[0].b64_json
    assert decoded(events[0].b64_json).shape == (8, 8)


def test_openais_client_edits_an_image_with_a_mask(client: OpenAI) -> None:
    mask = np.full((8, 8, 1), 7, np.uint8)
    made = client.images.edit(
        image=("image.png", png(PIXELS)),
        mask=("mask.png", png(mask, KNOWN)),
        prompt="",
        extra_body={"seed": 1, "steps": 3, "method": "replacement", "labels": "[2]"},
    )
    assert made.data is not None
    painted = decoded(made.data[0].b64_json)
    assert np.array_equal(painted[KNOWN], PIXELS[KNOWN, 0])
    assert not np.array_equal(painted, PIXELS[..., 0])


def test_openais_client_outpaints_by_a_larger_size(client: OpenAI) -> None:
    made = client.images.edit(
        image=png(PIXELS), prompt="", size="8x12", extra_body={"steps": 3, "method": "replacement"}
    )
    assert made.data is not None
    assert np.array_equal(decoded(made.data[0].b64_json)[2:10], PIXELS[..., 0])


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"stepz": 3}, "stepz"),
        ({"steps": 3.5}, "steps"),
        ({"labels": [9]}, "labels"),
        ({"n": 11}, "n"),
        ({"response_format": "hex"}, "response_format"),
        ({"image": "aGk="}, "image"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"partial_images": 2}, "partial_images"),
    ],
)
def test_a_wrong_field_is_named(url: str, fields: dict[str, Any], param: str) -> None:
    answer = requests.post(f"{url}v1/images/generations", json=SETTINGS | fields, timeout=ENDS_S)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "kind, data, problem",
    [
        ("application/json", b"{", "the body is no JSON"),
        ("application/json", b"[1]", "no JSON object"),
        ("application/json", b'{"steps": NaN}', "NaN is no number of JSON"),
        ("application/json", b'{"n": 1, "n": 2}', "n is given twice"),
        ("application/json", b"[" * 100_000, "the body is no JSON"),
        ("application/json", b"\xff", "the body is no JSON"),
        ("text/plain", b"{}", "Content-Type is 'text/plain'; send application/json"),
        ("multipart/form-data", b"--x", "the form cannot be read"),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n", "the form cannot be read"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    url: str, kind: str, data: bytes, problem: str
) -> None:
    answer = requests.post(
        f"{url}v1/images/generations",
        data=data,
        headers={"Content-Type": kind},
        timeout=ENDS_S,
    )
    assert answer.status_code in (400, 415)
    assert problem in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "files, data, problem",
    [
        ([("image", b"no image")], {}, "image:"),
        ([], {"prompt": "a"}, "image is missing"),
        ([("image", png(PIXELS)), ("image[]", png(PIXELS))], {}, "given twice: this server edits"),
        ([("photo", png(PIXELS))], {}, "photo is a file; files are image and mask"),
        ([("image", png(PIXELS))], {"mask": "x"}, "mask is a text; send a file"),
        ([("image", png(PIXELS))], {"strength": "much"}, "strength"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused(
    url: str, files: list[tuple[str, bytes]], data: dict[str, str], problem: str
) -> None:
    parts = [(name, ("x.png", file)) for name, file in files]
    fields = [(name, (None, text)) for name, text in data.items()]
    answer = requests.post(f"{url}v1/images/edits", files=[*parts, *fields], timeout=ENDS_S)
    assert answer.status_code == 400
    assert problem in answer.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_a_body_that_is_too_long_gets_an_answer(
    model: TrainedModel, announced: bool
) -> None:
    """Also one that reads only once it has sent all, as urllib does."""
    most = 4_000_000  # more than the buffers of a connection hold
    body = b"x" * (3 * most)
    with local_server(served({"digits": model}), http=HttpSettings(max_body=most)) as (url, _):
        request = urllib.request.Request(
            f"{url}v1/images/generations",
            data=body if announced else iter([body[:most], body[most:]]),
            headers={"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError, match="413") as refused:
            urllib.request.urlopen(request, timeout=ENDS_S)
        with refused.value as answer:
            assert "longer than 3.8147 MB" in json.load(answer)["error"]["message"]


def test_a_job_is_the_same_for_a_client_that_comes_back(url: str, model: TrainedModel) -> None:
    held(model)
    job = f"{url}v1/jobs/holiday-1"
    wanted = {"steps": 5, "n": 2, "partial_images": 1}
    first = requests.put(job, json=wanted, timeout=ENDS_S)
    assert first.status_code == 202
    assert first.json()["status"] in ("queued", "running")
    assert requests.put(job, json=wanted, timeout=ENDS_S).status_code == 202
    refused = requests.put(job, json={"steps": 4}, timeout=ENDS_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "id")
    counted(model).go_on.set()
    found = requests.get(f"{job}?wait=100", timeout=ENDS_S).json()
    assert found["status"] == "succeeded"
    events = requests.get(f"{job}/events", timeout=ENDS_S).text
    assert events.count("event: image_generation.partial_image") == 2  # of two images
    assert events.count("event: image_generation.completed") == 2
    images = [one["b64_json"] for one in found["data"]]
    requests.delete(job, timeout=ENDS_S)
    assert requests.get(job, timeout=ENDS_S).status_code == 404
    requests.put(job, json=wanted, timeout=ENDS_S)  # without a seed, the id gives it
    again = requests.get(f"{job}?wait=100", timeout=ENDS_S).json()
    assert [one["b64_json"] for one in again["data"]] == images


def test_a_cancelled_job_computes_no_further_step(
    server: tuple[str, LocalJobs], model: TrainedModel
) -> None:
    url, _ = server
    held(model)
    job = f"{url}v1/jobs/one"
    requests.put(job, json={"steps": 20}, timeout=ENDS_S)
    assert counted(model).called.acquire(timeout=ENDS_S)
    assert requests.delete(job, timeout=ENDS_S).json()["status"] == "cancelled"
    wait_for_free_engine(server[1], model)
    assert requests.get(job, timeout=ENDS_S).json()["status"] == "cancelled"
    assert len(counted(model).batches) <= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_costs_at_most_one_more_step(
    server: tuple[str, LocalJobs], model: TrainedModel, stream: bool
) -> None:
    url, jobs = server
    held(model)
    body = json.dumps({"steps": 20, "stream": stream}).encode()
    with raw_request(url, body) as connection:
        assert counted(model).called.acquire(timeout=ENDS_S)
        if stream:
            assert b"200 OK" in connection.recv(1000)
    wait_until(lambda: jobs.unfinished == 0)
    wait_for_free_engine(jobs, model)
    assert len(counted(model).batches) <= 1


def test_a_client_that_never_reads_holds_nothing_up(
    server: tuple[str, LocalJobs], client: OpenAI
) -> None:
    """Its answer, of 200 kB, fits into no buffer of the connection."""
    url, jobs = server
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    image = base64.b64encode(png(noise)).decode()
    fields = {"image": image, "strength": 0.2, "steps": 10, "n": 10}
    wanted = {**fields, "stream": True, "partial_images": 3}
    with raw_request(url, json.dumps(wanted).encode(), "edits"):
        wait_until(lambda: 'kind="edit",state="succeeded"' in jobs.metrics.text())
        assert client.images.generate(prompt="", extra_body=SETTINGS).data
    assert jobs.metrics.text().count('submitted_jobs_total{kind="edit"} 1.0') == 1


class Counts:
    """Jobs that note the names of the methods that are asked for."""

    def __init__(self, jobs: LocalJobs, calls: list[str]) -> None:
        self._jobs, self._calls = jobs, calls

    def __getattr__(self, name: str) -> Any:
        self._calls.append(name)
        return getattr(self._jobs, name)


@pytest.mark.parametrize("steps, status", [(5, 200), (21, 400)])
def test_a_request_that_waits_for_its_images_takes_one_message_to_the_table(
    steps: int, status: int, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray a message costs 3 ms of CPU, as much as a network call of a small model."""
    calls: list[str] = []
    monkeypatch.setattr(
        "tests.serving.local_server.build_app",
        lambda jobs, http: build_app(Counts(jobs, calls), http),
    )
    with local_server(served({"digits": model})) as (url, _):
        place = f"{url}v1/images/generations"
        answer = requests.post(place, json={"steps": steps}, timeout=ENDS_S)
        assert answer.status_code == status
        assert calls == ["submit"]


class Forgets:
    """Jobs whose table forgets a job as soon as it is there."""

    def __init__(self, jobs: LocalJobs) -> None:
        self._jobs = jobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def submit(self, key: JobKey, *order: Any) -> Submitted:
        """The job; then there is no such job."""
        found = await self._jobs.submit(key, *order[:2])
        for _ in ("end it", "forget it"):
            await self._jobs.cancel(key)
        return found


def test_a_forgotten_job_is_not_drawn_again(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table has forgotten it: another would have another identity."""
    monkeypatch.setattr(
        "tests.serving.local_server.build_app", lambda jobs, http: build_app(Forgets(jobs), http)
    )
    with local_server(served({"digits": model})) as (url, jobs):
        for stream in (False, True):
            fields = {"steps": 20, "stream": stream}
            answer = requests.post(f"{url}v1/images/generations", json=fields, timeout=ENDS_S)
            assert "the job was cancelled, or its images were forgotten" in answer.text
        assert 'submitted_jobs_total{kind="generation"} 2.0' in jobs.metrics.text()


@contextlib.contextmanager
def raw_request(url: str, body: bytes, kind: str = "generations") -> Iterator[socket.socket]:
    """A POST of images whose answer is not read; the connection is reset at the end."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = (
            f"POST /v1/images/{kind} HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        yield connection


def wait_for_free_engine(jobs: LocalJobs, model: TrainedModel) -> None:
    """Let the held call go on once its job is to end, and wait for that."""
    (one,) = jobs.models_by_name.current
    wait_until(lambda: all(task.stopped_by for task in one.engine._running))
    counted(model).go_on.set()
    wait_until(lambda: not one.engine._running)


def test_images_by_url_are_read_without_a_token(model: TrainedModel) -> None:
    http = HttpSettings(Access(clients_of("alice=" + "a" * 20)))
    with local_server(served({"digits": model}), http=http) as (url, _):
        with openai_client(url, "a" * 20) as client:
            made = client.images.generate(
                prompt="",
                response_format="url",
                extra_body={**SETTINGS, "output_format": "webp"},
            )
        assert made.data is not None
        place = made.data[0].url or ""
        answer = requests.get(place, timeout=ENDS_S)
        assert answer.headers["Content-Type"] == "image/webp"
        assert near(opened(answer.content)[..., 0], model.sample(1, seed=3, steps=5)[0])
        others = place.replace("webp", "png"), place.replace("/0.", "/1."), f"{url}v1/files/x/0.png"
        for wrong in others:
            assert requests.get(wrong, timeout=ENDS_S).status_code == 404


def test_clients_have_tokens_budgets_and_jobs_of_their_own(model: TrainedModel) -> None:
    http = HttpSettings(Access(clients_of(f"alice={'a' * 20},bob={'b' * 20}")))
    buckets = {"alice": TokenBucket(per_s=1e-6, burst=64 * 5 / 1e6)}
    with local_server(served({"digits": model}), http=http, buckets=buckets) as (url, _):
        alice, bob, eve = ({"Authorization": f"Bearer {one * 20}"} for one in "abe")
        for path in ("v1/models", "metrics", "v1/jobs/x", "v1/tools"):
            for headers in ({}, eve, {"Authorization": "Basic " + "a" * 20}):
                answer = requests.get(url + path, headers=headers, timeout=ENDS_S)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert requests.get(url + "healthz", timeout=ENDS_S).status_code == 200
        job = f"{url}v1/jobs/mine"
        for headers, status in ((alice, 202), (bob, 202)):  # two jobs of one id
            answer = requests.put(job, json={"steps": 5}, headers=headers, timeout=ENDS_S)
            assert answer.status_code in (200, status)
        answer = requests.post(
            f"{url}v1/images/generations", json={"steps": 5}, headers=alice, timeout=ENDS_S
        )
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 300
        answer = requests.post(
            f"{url}v1/images/generations", json={"steps": 5}, headers=bob, timeout=ENDS_S
        )
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),  # a name of another site for 127.0.0.1
        ({"Origin": "http://["}, 403),
        ({"Host": "["}, 403),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({}, 200),
    ],
)
def test_web_pages_of_other_sites_cannot_use_a_server(
    url: str, headers: dict[str, str], status: int
) -> None:
    answer = requests.get(url + "v1/models", headers=headers, timeout=ENDS_S)
    assert answer.status_code == status
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "text",
    ["short", "alice=short", "a b" * 10, "=" + "a" * 10, f"x={'a' * 20},x={'b' * 20}"],
)
def test_unusable_tokens_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"token [12] ") as refused:
        clients_of(text)
    assert text.partition("=")[2] not in str(refused.value) or not text.partition("=")[2]


def test_overload_is_refused_at_once_with_a_time(model: TrainedModel) -> None:
    service = ServiceSettings(max_queued_s=1e-6)
    with local_server(served({"digits": model}), service=service) as (url, jobs):
        requests.post(f"{url}v1/images/generations", json={"steps": 2}, timeout=ENDS_S)
        held(model)
        requests.put(f"{url}v1/jobs/long", json={"steps": 20}, timeout=ENDS_S)
        for path in ("images/generations", "images/generations"):
            answer = requests.post(f"{url}v1/{path}", json={"steps": 2}, timeout=ENDS_S)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        counted(model).go_on.set()
        wait_until(lambda: jobs.unfinished == 0)


class LosesTable:
    """Jobs whose table is lost: the first calls of a method fail, and it forgets all jobs."""

    def __init__(self, jobs: LocalJobs, calls: int) -> None:
        self._jobs, self._left = jobs, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def submit(self, *job: Any) -> Submitted:
        """The job, unless the table is lost now."""
        return self._unless_lost(await self._jobs.submit(*job))

    async def report(self, *job: Any) -> JobReport:
        """The report, unless the table is lost now."""
        return self._unless_lost(await self._jobs.report(*job))

    def _unless_lost(self, found: T) -> T:
        if self._left:
            self._left -= 1
            self._jobs._open.clear()
            self._jobs.identity = f"after {self._left} more"
            raise TableLostError("killed")
        return found


def test_a_lost_table_is_not_noticed_by_a_client_that_waits(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(jobs: Any, http: HttpSettings) -> FastAPI:
        return build_app(LosesTable(jobs, 2), http)

    monkeypatch.setattr("tests.serving.local_server.build_app", losing)
    with local_server(served({"digits": model})) as (url, _):
        with openai_client(url) as client:
            made = client.images.generate(prompt="", extra_body=SETTINGS).data
        assert made is not None
        assert near(decoded(made[0].b64_json), model.sample(1, seed=3, steps=5)[0])


def test_a_lost_replica_is_not_noticed_in_a_stream(model: TrainedModel) -> None:
    """It is lost after the first preview, and again after the second."""
    losses = [2, 1]

    def losing(draw: Draw) -> Draw:
        async def lossy(
            order: ImageOrder, source: str, affordable: float, table: str
        ) -> AsyncGenerator[Event, None]:
            left = losses.pop() if losses else 100
            events = draw(order, source, affordable, table)
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
                    left -= isinstance(event, PreviewFiles)
                    if not left:
                        raise ReplicaLostError("killed")

        return lossy

    table = TableSettings(retry_s=0)
    with local_server(served({"digits": model}), draw=losing, table=table) as (url, jobs):
        with openai_client(url) as client:
            stream = client.images.generate(
                prompt="", stream=True, partial_images=3, extra_body={**SETTINGS, "steps": 9}
            )
            events = [*stream]
        numbers = [getattr(event, "partial_image_index", None) for event in events]
        assert numbers == [0, 1, 2, None]
        assert near(decoded(events[-1].b64_json), model.sample(1, seed=3, steps=9)[0])
        assert "ddpm_ray_restarted_jobs_total 2.0" in jobs.metrics.text()


def test_the_api_describes_itself(url: str) -> None:
    api = requests.get(url + "openapi.json", timeout=ENDS_S).json()
    body = api["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    schema = body["multipart/form-data"]["schema"]
    assert schema["required"] == ["image"]
    assert schema["properties"]["strength"]["exclusiveMinimum"] == 0
    assert requests.get(url + "docs", timeout=ENDS_S).status_code == 404  # of another host
    for path in ("", "healthz"):
        assert requests.head(url + path, timeout=ENDS_S).status_code == 200
    tools = requests.get(url + "v1/tools", timeout=ENDS_S).json()
    assert [tool["function"]["name"] for tool in tools] == ["generate_image", "edit_image"]
    answer = requests.post(url + "v1/images/paint", json={}, timeout=ENDS_S)
    assert answer.json()["error"]["message"] == "POST /v1/images/paint: Not Found"


def test_a_call_of_a_chat_tool_is_a_request(url: str) -> None:
    """Each field of a tool is a field of the API, and its example values are accepted."""
    generate, _ = chat_tools()
    fields = generate["function"]["parameters"]["properties"]
    values = {name: field["default"] for name, field in fields.items() if "default" in field}
    answer = requests.post(
        f"{url}v1/images/generations", json={**values, "steps": 3}, timeout=ENDS_S
    )
    assert answer.status_code == 200, answer.text
    assert "stream" not in fields


def test_a_refused_stream_is_an_http_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="labels"):
        client.images.generate(prompt="", stream=True, extra_body={"labels": [9]})


def test_files_of_other_formats(client: OpenAI, model: TrainedModel) -> None:
    made = client.images.generate(prompt="", output_format="jpeg", extra_body=SETTINGS)
    assert made.data is not None
    with Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json or ""))) as image:
        assert image.format == "JPEG"

"""Wrong, huge, slow and broken requests: each gets a JSON error, and the server goes on."""

import io
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.http.http_server import HttpSettings
from ddpm_ray.serving.image_service import ServiceSettings
from ddpm_ray.serving.job_plans import RequestLimits
from tests.limits import ENDS_S
from tests.serving.counted_model import tiny_model
from tests.serving.local_server import local_server, served
from tests.serving.test_image_service import KNOWN, PIXELS, png

MOST_PIXELS = 10_000


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = ServiceSettings(requests=RequestLimits(max_pixels=MOST_PIXELS))
    http = HttpSettings(max_body=4 * 2**20, max_body_s=0.5)
    with local_server(served({"digits": tiny_model()}), http=http, service=service) as (at, _):
        yield at


def posted(url: str, **request: Any) -> requests.Response:
    return requests.post(url, timeout=ENDS_S, **request)


def image_of(width: int, height: int) -> bytes:
    """A PNG whose head says this size; its pixels are compressed zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(file, "JPEG")
    return file.getvalue()


OPAQUE = png(PIXELS)
WRONG_EDITS: list[tuple[dict[str, bytes], dict[str, Any], str, str]] = [
    ({"image": b"GIF89a no image"}, {}, "image", "image"),
    ({"image": png(PIXELS)[:60]}, {}, "image", "image"),
    ({"image": image_of(10_000, 10_000)}, {}, "image", "pixels"),
    ({"image": image_of(2**31 - 1, 2**31 - 1)}, {}, "image", "image"),
    ({"image": OPAQUE, "mask": png(PIXELS[:4], KNOWN[:4])}, {}, "mask", "mask is 8 x 4"),
    ({"image": OPAQUE, "mask": OPAQUE}, {}, "mask", "mask has no transparent pixel"),
    ({"image": OPAQUE, "mask": jpeg()}, {}, "mask", "mask has no transparent pixel"),
    ({"image": OPAQUE}, {"size": "4x4"}, "size", "size is 4x4"),
    ({"image": OPAQUE}, {"size": "4000x4000"}, "size", "at most 10000 pixels"),
    ({"image": OPAQUE}, {"size": "96x96", "n": 10}, "size", "allows at most 1024"),
    ({"image": OPAQUE}, {"strength": "0"}, "strength", "must be above 0"),
    ({"image": OPAQUE}, {"prompt": "a cat"}, "prompt", "text"),
]


@pytest.mark.parametrize("files, fields, param, problem", WRONG_EDITS)
def test_a_wrong_upload_is_named(
    url: str, files: dict[str, bytes], fields: dict[str, str], param: str, problem: str
) -> None:
    parts = {name: (f"{name}.png", file) for name, file in files.items()}
    answer = posted(f"{url}v1/images/edits", files=parts, data={"steps": 3, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert problem in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields, param, status",
    [
        ({"n": 0}, "n", 400),
        ({"n": True}, "n", 400),
        ({"steps": 21}, "steps", 400),
        ({"steps": 0}, "steps", 400),
        ({"seed": -1}, "seed", 400),
        ({"seed": "one"}, "seed", 400),
        ({"model": "dall-e-2"}, "model", 404),
        ({"prompt": "x" * 5000}, "prompt", 400),
        ({"prompt": ["a"]}, "prompt", 400),
        ({"size": "8"}, "size", 400),
        ({"labels": {"a": 1}}, "labels", 400),
        ({"labels": [[1]]}, "labels", 400),
        ({"guidance_scale": "Infinity"}, "guidance_scale", 400),
        ({"sampler": None, "steps": 3, "eta": 2}, "eta", 400),
        ({"quality": "hd"}, "quality", 400),
        ({"seed": 2**64}, "seed", 400),
        ({"guidance_scale": 1e308}, "guidance_scale", 400),
        ({"labels": [0] * 11}, "labels", 400),
        ({"user": "x" * 257}, "user", 400),
        ({"negative_prompt": "x" * 5000}, "negative_prompt", 400),
        ({"\ud800": 1}, "\\ud800", 400),
        ({"\u202e\x1b[2J": 1}, "\u202e\x1b[2J", 400),
    ],
)
def test_a_wrong_value_is_named(url: str, fields: dict[str, Any], param: str, status: int) -> None:
    answer = posted(f"{url}v1/images/generations", json={"steps": 3, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error


def test_a_wrong_kind_or_wait_of_a_job_is_named(url: str) -> None:
    answer = requests.put(f"{url}v1/jobs/a", json={"kind": []}, timeout=ENDS_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kind")
    for wait in ("soon", "nan", "-1", "1e9"):
        answer = requests.get(f"{url}v1/jobs/a?wait={wait}", timeout=ENDS_S)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wait")


def test_a_deleted_job_says_what_it_was(url: str) -> None:
    job = f"{url}v1/jobs/done"
    requests.put(job, json={"steps": 3}, timeout=ENDS_S)
    assert requests.get(f"{job}?wait=100", timeout=ENDS_S).json()["status"] == "succeeded"
    assert requests.delete(job, timeout=ENDS_S).json()["status"] == "succeeded"
    assert requests.delete(job, timeout=ENDS_S).status_code == 404


@pytest.mark.parametrize("job", ["a b", "a" * 129, "ä", "%0a", "%2e%2e"])
def test_an_id_has_plain_characters(url: str, job: str) -> None:
    answer = requests.put(f"{url}v1/jobs/{job}", json={"steps": 3}, timeout=ENDS_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


def test_a_body_that_comes_too_slowly_is_refused(url: str) -> None:
    """Its client sends the head, one byte, and then nothing."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=ENDS_S) as connection:
        connection.sendall(
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        answer = connection.recv(10_000)
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert posted(f"{url}v1/images/generations", json={"steps": 3}).status_code == 200


def test_an_upload_that_is_cut_off_costs_nothing(url: str) -> None:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=ENDS_S) as connection:
        connection.sendall(
            f"POST /v1/images/edits HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9999\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc'.encode()
        )
    assert posted(f"{url}v1/images/generations", json={"steps": 3}).status_code == 200


def test_a_full_disk_concerns_no_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of forms would write an upload above 1 MB to a file; this one has 2 MB."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (80, 80), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    padded = file.getvalue() + bytes(2_000_000)  # after its end, which readers of PNG skip
    answer = posted(
        f"{url}v1/images/edits",
        files={"image": ("x.png", padded)},
        data={"steps": 2, "strength": 0.5, "response_format": "url"},
    )
    assert answer.status_code == 200, answer.text
    assert requests.get(answer.json()["data"][0]["url"], timeout=ENDS_S).status_code == 200


def test_prometheus_reads_the_metrics(url: str) -> None:
    posted(f"{url}v1/images/generations", json={"steps": 3})
    text = requests.get(f"{url}metrics", timeout=ENDS_S).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ended = {
        (sample.labels["kind"], sample.labels["state"]): sample.value
        for sample in families["ddpm_ray_ended_jobs"].samples
        if sample.name.endswith("_total")
    }
    assert ended["generation", "succeeded"] >= 1
    assert families["ddpm_ray_job_seconds"].type == "histogram"
    opened = families["ddpm_ray_open_jobs"].samples
    assert {sample.value for sample in opened} == {0.0}


def test_all_that_was_refused_left_no_job(model: TrainedModel) -> None:
    with local_server(served({"digits": model})) as (at, jobs):
        for fields in ({"steps": 0}, {"stepz": 1}, {"labels": [9], "steps": 3}):
            assert posted(f"{at}v1/images/generations", json=fields).status_code == 400
        assert jobs.unfinished == 0
        assert not jobs._open

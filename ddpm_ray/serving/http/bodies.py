"""Bodies of requests: JSON, or a form with files. All of it stays in memory, and is bounded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ddpm_ray.serving.image_requests import UPLOADS
from ddpm_ray.serving.request_errors import RequestError

FILES = tuple(dict.fromkeys(name for _, possible in UPLOADS.values() for name in possible))
MOST_FIELDS = 50
# Of a body that is too long, so many times the limit is read, and dropped: a client that sends all
# of it before it reads gets the answer, and not a broken connection.
DROPPED = 4


class Body(NamedTuple):
    """The fields of a request."""

    values: dict[str, Any]  # of JSON; or texts, of a form
    files: dict[str, bytes]  # by field: those of FILES
    is_form: bool


def announced_bytes(request: Request) -> float:
    """The length of a body, as its head says; 0 where it says none."""
    length = request.headers.get("content-length", "")
    return float(length) if length.isdecimal() else 0.0


async def read_body(request: Request, max_bytes: int, max_s: float) -> Body:
    """Read the fields of a request. Raises RequestError: 400, 408, 413, 415."""
    try:
        async with asyncio.timeout(max_s):
            return await _read(request, max_bytes)
    except TimeoutError as error:
        raise RequestError(f"the body did not come within {max_s:g} s", status=408) from error


async def _read(request: Request, max_bytes: int) -> Body:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    stream = _bounded(request, max_bytes)
    if kind == "multipart/form-data":
        return await _form(request, stream, max_bytes)
    if kind != "application/json":
        given = f"Content-Type is {kind!r}" if kind else "there is no Content-Type"
        raise RequestError(f"{given}; send application/json or multipart/form-data", status=415)
    data = b"".join([part async for part in stream])
    try:
        values = json.loads(data, parse_constant=_refuse, object_pairs_hook=_once)
    except RecursionError as error:
        raise RequestError("the body is no JSON: it is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body is no JSON object, as {} is")
    files = {name: _decoded(name, values.pop(name)) for name in FILES if name in values}
    return Body(values, files, is_form=False)


class _InMemory(MultiPartParser):
    """Keeps files in memory: the body is bounded, and a full disk then concerns nobody."""

    spool_max_size = 2**40


async def _form(request: Request, stream: AsyncGenerator[bytes, None], max_bytes: int) -> Body:
    try:
        parser = _InMemory(
            request.headers,
            stream,
            max_files=len(FILES),
            max_fields=MOST_FIELDS,
            max_part_size=max_bytes,
        )
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"the form cannot be read: {error.message}") from error
    except (KeyError, UnicodeDecodeError) as error:
        raise RequestError(f"the form cannot be read: {error}") from error
    try:
        return await _of_form(form)
    finally:
        await form.close()


async def _of_form(form: FormData) -> Body:
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        name = "image" if name == "image[]" else name
        if name in values or name in files:
            more = ": this server edits one image" if name == "image" else ""
            raise RequestError(f"{name} is given twice{more}", name)
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise RequestError(f"{name} is a file; files are {' and '.join(FILES)}", name)
            files[name] = await value.read()
        elif name in FILES:
            raise RequestError(f"{name} is a text; send a file", name)
        else:
            values[name] = value
    return Body(values, files, is_form=True)


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the body; RequestError if it is, or says that it is, too long."""
    problem = RequestError(
        f"the body is longer than {max_bytes / 2**20:g} MB, the limit of this server", status=413
    )
    announced, size = announced_bytes(request), 0
    waits = "expect" in request.headers  # for our consent, before it sends the body
    if announced > (max_bytes if waits else DROPPED * max_bytes):
        raise problem
    try:
        async for part in request.stream():
            size += len(part)
            if size > DROPPED * max_bytes:
                break
            if max(size, announced) <= max_bytes:
                yield part
    except ClientDisconnect as error:
        raise RequestError("the client has left", status=499) from error
    if max(size, announced) > max_bytes:
        raise problem


def _decoded(name: str, value: object) -> bytes:
    """The file of a JSON field: base64, or a data URL."""
    if not isinstance(value, str):
        raise RequestError(f"{name} has to be one file, as a text in base64", name)
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64: {error}", name) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, each of which is given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice} is given twice")
    return found


def _refuse(constant: str) -> Mapping[str, Any]:
    raise ValueError(f"{constant} is no number of JSON")

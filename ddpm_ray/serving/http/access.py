"""Who may use a server: bearer tokens, and the origins of web pages."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from starlette.requests import Request

from ddpm_ray.config.jobs.serve import LOOPBACK
from ddpm_ray.serving.request_errors import RequestError

LOCAL = "local"  # the client of a server without tokens
_TOKEN = re.compile(r"(?:([A-Za-z0-9_.-]{1,64})=)?([\x21-\x2b\x2d-\x7e]{16,512})")


def clients_of(text: str) -> dict[str, str]:
    """The clients of "alice=TOKEN,bob=TOKEN": name -> sha256 of the token.

    A token without a name has that of its place: client1, ... Tokens have at least 16 characters,
    without blanks and commas. Raises ValueError, which shows no token.
    """
    clients: dict[str, str] = {}
    for place, part in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        if (found := _TOKEN.fullmatch(part)) is None:
            raise ValueError(
                f"token {place} is not NAME=TOKEN with 16 to 512 characters without blanks: make "
                "one by `openssl rand -hex 32`"
            )
        name = found[1] or f"client{place}"
        if name in clients or _digest(found[2]) in clients.values():
            raise ValueError(f"token {place} has the name or the text of an earlier one")
        clients[name] = _digest(found[2])
    return clients


@dataclass(frozen=True)
class Access:
    """The clients of a server; without tokens everyone who reaches it is one client."""

    clients: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of the token

    def client(self, request: Request) -> str:
        """The name of the client. Raises RequestError with status 401 or 403.

        A web page of another site must not use a server that its visitor can reach: browsers send
        its address with the request. Without tokens the host must be a name of this machine, since
        another site may give its own name the address 127.0.0.1.
        """
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            raise RequestError(
                "the request comes from a web page of another site", status=403, code="origin"
            )
        if not self.clients:
            if _parts(f"//{host}").hostname not in LOOPBACK:
                raise RequestError(
                    "this server has no tokens: address it as 127.0.0.1 or localhost, or start it "
                    "with DDPM_RAY_TOKENS",
                    status=403,
                )
            return LOCAL
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip()) if kind.lower() == "bearer" else ""
        for name, wanted in self.clients.items():
            if hmac.compare_digest(digest, wanted):
                return name
        raise RequestError(
            "give a token of this server: Authorization: Bearer TOKEN",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _parts(url: str) -> SplitResult:
    """The parts of a URL; none of one that cannot be read."""
    try:
        found = urlsplit(url)
        _ = found.hostname
    except ValueError:
        return urlsplit("")
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

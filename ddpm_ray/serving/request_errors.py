"""Errors of a request, in the form of OpenAI's API."""

import logging
import secrets
from collections.abc import Iterable
from typing import Any

from ddpm_ray.serving.limits import OverloadedError

CANCELLED = "job_cancelled"  # code of the error of a cancelled job
OVERLOADED = "overloaded"  # code where a model has no room for any job


class RequestError(ValueError):
    """A request that cannot be served; `param` is the field that is wrong, if one is."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of other processes have all fields."""
        return _restored, (self.message, self.param, self.status, self.code, self.headers)

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "param": self.param}  # may hold what a client sent
        clean = {
            name: text and text.encode("utf-8", "backslashreplace").decode()
            for name, text in fields.items()
        }
        return {"error": clean | {"type": kind, "code": self.code}}


def _restored(
    message: str, param: str | None, status: int, code: str | None, headers: dict[str, str]
) -> RequestError:
    return RequestError(message, param, status=status, code=code, headers=headers)


def overloaded(error: OverloadedError) -> RequestError:
    """The error 429 of what is refused for now."""
    headers = {"Retry-After": str(error.retry_after_s)}
    code = OVERLOADED if error.is_full else None
    return RequestError(str(error), status=429, code=code, headers=headers)


def unknown_model(name: str, known: Iterable[str]) -> RequestError:
    """The error 404 of a request for a model that is not served."""
    problem = f"there is no model {name!r}; there are {', '.join(known)}"
    return RequestError(problem, "model", status=404, code="model_not_found")


def cancelled(why: str) -> RequestError:
    """The error of a job that was ended before its images were there."""
    return RequestError(why, status=409, code=CANCELLED)


def shutting_down() -> RequestError:
    """The error of a server that takes no more jobs."""
    problem = "the server is shutting down"
    return RequestError(problem, status=503, headers={"Retry-After": "5"})


def server_error(log: logging.Logger, what: str, error: BaseException) -> RequestError:
    """Log an error of the program, and return one for the client, which has a reference to it.

    Its text may show paths and addresses of the server.
    """
    reference = secrets.token_hex(4)
    log.error("%s (reference %s)", what, reference, exc_info=error)
    problem = f"{what}; the log of the server has the reason (reference {reference})"
    return RequestError(problem, status=500)

"""Errors of a request, in the form of OpenAI's API."""

from typing import Any


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
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def _restored(
    message: str, param: str | None, status: int, code: str | None, headers: dict[str, str]
) -> RequestError:
    return RequestError(message, param, status=status, code=code, headers=headers)

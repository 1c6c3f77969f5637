"""Check that something listens at a Ray address; Ray's client takes 14 minutes to give up."""

import socket
import time

RETRY_S = 1.0


def require_listener(address: str, timeout_s: float, patience_s: float = 0.0) -> None:
    """Raise ConnectionError unless a connection to `address` opens within `timeout_s`.

    Retries for `patience_s`, in case the head is about to start. Addresses without a port, such as
    `auto`, are not checked.
    """
    if address.startswith("http"):
        raise ConnectionError("this is the dashboard's address; use the head's host:6379")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return
    until_s = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() >= until_s:
                raise ConnectionError(" ".join(str(error).split())) from error
        time.sleep(RETRY_S)

"""Whether anything listens at a Ray address; Ray's own client takes 14 minutes to say no."""

import socket
import time

RETRY_S = 1.0


def require_listener(address: str, timeout_s: float, patience_s: float = 0.0) -> None:
    """Raise ConnectionError unless a connection to `address` opens within `timeout_s`.

    Tried again for `patience_s`: a head may be about to start. Addresses without a port, as `auto`,
    are left to Ray.
    """
    if address.startswith("http"):
        raise ConnectionError("this is the dashboard's address, give the head's host:6379")
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

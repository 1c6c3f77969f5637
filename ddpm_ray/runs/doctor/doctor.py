"""Doctor: run all checks of a set-up at once, each in its own process.

Processes rather than threads: a hang in Ray's C++ code or in a DNS look-up can only be killed.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.runs.doctor import checks
from ddpm_ray.runs.doctor.checks import SET_CLOCK, Clock, Finding
from ddpm_ray.runs.doctor.local_checks import local_ray, ray_address

SLOW = {  # checks that run in a process, and the remedy if one times out
    "storage": "check AWS_ENDPOINT_URL, the network, and that the store is up",
    "MLflow": "check that the server is up and that nothing else took its port",
    "Ray": "see `ray status` on the head; where it wants a token, set RAY_AUTH_MODE=token",
}
LOCAL_RAY_SLOW = "this machine is busy: let the check take longer, as with timeout_s=60"
WORST_SKEW_S = 5.0  # tolerated by request signatures, metric time stamps and Ray
GOODBYE_S = 1.0
SPARE_S = 3.0  # reserved to query clocks and report silent nodes

Found = Finding | Clock


class UnhealthyError(RuntimeError):
    """A run would fail on this set-up; the message names the failed checks."""


def examine(config: DoctorConfig, home: Path) -> list[Finding]:
    """Run all checks; return the findings in a fixed order, within about timeout_s + 1 s."""
    until = time.monotonic() + config.timeout_s
    spawn = multiprocessing.get_context("spawn")  # fsspec's and Ray's threads do not survive a fork
    watched: dict[Connection, tuple[str, BaseProcess]] = {}
    found: dict[str, list[Found]] = {"packages": list(checks.packages())}
    for check in SLOW:
        receiver, sender = spawn.Pipe(duplex=False)
        process: BaseProcess = spawn.Process(
            target=_try, args=(check, config, home, until, sender), daemon=True
        )
        process.start()
        sender.close()
        watched[receiver] = check, process
        found[check] = []
    while watched and (left := until - time.monotonic()) > 0:
        for ready in wait(list(watched), left):
            assert isinstance(ready, Connection)
            check, process = watched[ready]
            try:
                found[check].append(ready.recv())
            except EOFError:
                del watched[ready]
                process.join(GOODBYE_S)
                if process.exitcode is None:
                    process.kill()  # all findings are here; Ray may take long to shut down
                elif process.exitcode:
                    text = f"the check crashed with exit code {process.exitcode}"
                    found[check].append(Finding(check, "fail", text, SLOW[check]))
    for check, process in watched.values():
        process.kill()
        address = ray_address(config)
        place = {"storage": config.storage, "MLflow": config.tracking_uri, "Ray": address}
        text = f"{place[check]}: timed out after timeout_s={config.timeout_s:g}".removeprefix(": ")
        local = check == "Ray" and not address
        remedy = LOCAL_RAY_SLOW if local else SLOW[check]
        found[check].append(Finding(check, "fail", text, remedy))
    everything = [one for findings in found.values() for one in findings]
    clocks = [one for one in everything if isinstance(one, Clock)]
    findings = [one for one in everything if isinstance(one, Finding)]
    return findings + ([_clocks(clocks)] if clocks else [])


def print_findings(findings: list[Finding]) -> None:
    """Print a table on stderr: each check, its finding and remedy."""
    table = Table("check", "", "found", show_lines=False, pad_edge=False, box=None)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for one in findings:
        # Escape brackets, which IPv6 addresses and messages contain.
        cell = f"{one.found}\n-> {one.remedy}" if one.remedy else one.found
        colour = colours[one.verdict]
        table.add_row(one.check, f"[{colour}]{one.verdict}[/]", _plain(cell))
    Console(stderr=True).print(table)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _try(check: str, config: DoctorConfig, home: Path, until: float, found: Connection) -> None:
    """Run one check in this process; send each finding."""
    if not os.environ.get("DDPM_RAY_TRACEBACK"):  # Ray's C++ code writes to stderr as well
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    try:
        for one in _findings(check, config, home, until):
            found.send(one)
    except Exception as error:  # noqa: BLE001 - any error becomes a finding
        text = " ".join(str(error).split()) or type(error).__name__
        found.send(Finding(check, "fail", text[:200], "DDPM_RAY_TRACEBACK=1 shows more"))
    found.close()


def _findings(check: str, config: DoctorConfig, home: Path, until: float) -> Iterator[Found]:
    match check:
        case "storage":
            return checks.storage_keeps(config, home)
        case "MLflow":
            return checks.mlflow_answers(config, home)
        case _ if address := ray_address(config):
            from ddpm_ray.runs.doctor.ray_checks import ray_answers  # heavy: imports Ray

            return ray_answers(address, until - SPARE_S)
        case _:
            return local_ray()


def _clocks(clocks: list[Clock]) -> Finding:
    shown = ", ".join(f"{one.place} {one.ahead_s:+.1f} s" for one in clocks[:8])
    far = [one for one in clocks if abs(one.ahead_s) > WORST_SKEW_S]
    if far:
        text = ", ".join(f"{one.place} is {one.ahead_s:+.1f} s off this machine's" for one in far)
        return Finding("clocks", "fail", text, SET_CLOCK)
    return Finding("clocks", "ok", f"against this machine's: {shown}")

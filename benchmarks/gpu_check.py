"""Test and measure this machine's GPU in at most 8 minutes: one table, one line of JSON.

    python -m benchmarks.gpu_check [--toy] [--only steps restart ...]

It needs torch, numpy, pyarrow, safetensors, omegaconf and fsspec, no installation and no network;
docs/gpu.md says what each row means. Each section runs in a process of its own within its own time.
The exit code is 1 where one of them failed or was cut off; the others' rows are there. Without a
GPU, and with --toy, everything runs at toy sizes on the CPU, to try the script itself.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LIMITS_S = {  # of each section; 475 s together
    "cases": 60,
    "steps": 70,
    "idle": 40,
    "compiled": 110,
    "large": 40,
    "parts": 25,
    "checkpoint": 30,
    "restart": 80,
    "inception": 20,
}
TOY_LIMIT_S = 400  # of each, on a CPU that is busy with other things
NO_GPU = "NO GPU: toy sizes on the CPU, to try this script. These are not figures of a GPU."
GPU = "Measured on {device}, torch {torch}, CUDA {cuda}."


def main() -> None:
    """Run the sections, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    arguments = parser.parse_args()
    toy = arguments.toy or not torch.cuda.is_available()
    facts = machine(toy)
    heading = NO_GPU if toy else GPU.format(**facts)
    print(heading, flush=True)
    sections = {}
    for name in arguments.only:
        sections[name] = ran(name, TOY_LIMIT_S if toy else LIMITS_S[name], toy)
        print("\n".join(table(name, sections[name])), flush=True)
    passed = all(section["status"] == "ok" for section in sections.values())
    print(heading)
    print(json.dumps({"passed": passed, **facts, "sections": sections}))
    sys.exit(0 if passed else 1)


def machine(toy: bool) -> dict[str, Any]:
    """The machine and versions that were measured."""
    device = platform.processor() or platform.machine() if toy else torch.cuda.get_device_name()
    return {
        "gpu": not toy,
        "device": device,
        "torch": torch.__version__,
        "cuda": None if toy else torch.version.cuda,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the checkout, where git knows it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None


def ran(name: str, limit_s: float, toy: bool) -> dict[str, Any]:
    """The section's status (ok, failed or cut off), seconds, rows, and error if it has one."""
    command = [sys.executable, "-m", "benchmarks.gpu.sections", name, str(limit_s - 2)]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:  # a pipe might be held open by what outlives it
        section = subprocess.Popen(
            command + (["--toy"] if toy else []), cwd=ROOT, stdout=out, start_new_session=True
        )
        try:
            section.wait(limit_s)
            status = "failed" if section.returncode else "ok"
        except subprocess.TimeoutExpired:
            status = "cut off"
        finally:  # also where this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(section.pid, signal.SIGKILL)  # with the processes that it started
            section.wait()
        out.seek(0)
        lines = list(parsed(out.read()))
    found: dict[str, Any] = {
        "status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "rows": [line for line in lines if "name" in line],
    }
    errors = [line["error"] for line in lines if "error" in line]
    if status == "cut off":
        found["error"] = f"its {limit_s:g} s were over"
    elif status == "failed":
        found["error"] = errors[0] if errors else f"it ended with {section.returncode}"
    return found


def parsed(text: str) -> Iterator[dict[str, Any]]:
    """The objects among the lines; a section that was killed may leave half a line."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def table(name: str, section: dict[str, Any]) -> Iterator[str]:
    """Lines of one section."""
    yield f"\n{name}: {section['status']}, {section['seconds']:g} s"
    width = max((len(row["name"]) for row in section["rows"]), default=0)
    for row in section["rows"]:
        found = "   ".join(f"{unit} {shown(value)}" for unit, value in row["found"].items())
        yield f"  {row['name']:<{width}}  {found or ''}{row['note']}".rstrip()
    if "error" in section:
        yield f"  ERROR: {section['error']}"


def shown(value: float | bool | str) -> str:
    """A value as text, to read."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return value if isinstance(value, str) else f"{value:,.6g}"


if __name__ == "__main__":
    main()

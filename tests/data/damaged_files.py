"""Damaged files are read in a process of their own, because an invalid read would kill this one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def check_damage_is_found(script: str, argument: str) -> None:
    """The script ends with "READ REFUSED", numbers of damaged files: more than 100 of each kind."""
    command = [sys.executable, "-c", script, argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read > 100
    assert refused > 100

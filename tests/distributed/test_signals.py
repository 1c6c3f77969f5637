"""Signals, tested in a subprocess: the first stops, the second ends; a closed terminal counts."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_ray.distributed import signals
from ddpm_ray.distributed.signals import SIGNALS, Interrupts, block_terminal_signals
from tests.limits import ENDS_S

# Says `ready`, waits for the first signal, says what it is told to say, and for the second.
# The module alone: the package would load torch.
PROGRAM = """
import sys, threading
sys.path.insert(0, "ddpm_ray/distributed")
import signals
from signals import Interrupts, exit_code
signals.SENT_TWICE_S = 60  # the machine may be slow
with Interrupts() as came:
    print("ready", file=sys.stderr, flush=True)
    while not came.count:
        threading.Event().wait(0.05)
    for _ in range(3):  # to a terminal that may be gone
        print("stopping", file=sys.stderr, flush=True)
    if "twice" in sys.argv:
        try:
            print("asked", flush=True)
            while True:
                threading.Event().wait(0.05)
        except KeyboardInterrupt:
            print("at once", flush=True)
sys.exit(exit_code())
"""
LIMIT_S = ENDS_S


def started(*arguments: str, ignoring: int | None = None) -> subprocess.Popen[str]:
    def ignore() -> None:
        for number in SIGNALS:  # the tests may run under nohup, which ignores SIGHUP
            signal.signal(number, signal.SIG_IGN if number == ignoring else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        text=True,
        start_new_session=True,
        preexec_fn=ignore,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stderr is not None
    assert next(process.stderr) == f"{line}\n"


@pytest.fixture
def bounded() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes put here are ended after a while, whatever they do."""
    processes: list[subprocess.Popen[str]] = []

    def end() -> None:
        for process in processes:
            process.kill()

    limit = threading.Timer(LIMIT_S, end)
    limit.start()
    yield processes
    limit.cancel()
    end()
    for process in processes:
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_asks_and_is_the_exit_code(
    number: signal.Signals, bounded: list[subprocess.Popen[str]]
) -> None:
    bounded.append(process := started())
    wait_for(process, "ready")
    process.send_signal(number)
    assert process.wait(LIMIT_S) == 128 + number


def test_the_second_signal_of_any_kind_ends_at_once(
    bounded: list[subprocess.Popen[str]],
) -> None:
    bounded.append(process := started("twice"))
    wait_for(process, "ready")
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None
    assert next(process.stdout) == "asked\n"
    process.send_signal(signal.SIGQUIT)
    assert next(process.stdout) == "at once\n"
    assert process.wait(LIMIT_S) == 128 + signal.SIGQUIT


def test_a_signal_that_comes_twice_at_once_is_one(bounded: list[subprocess.Popen[str]]) -> None:
    """`timeout` signals the process, then its group: the second would skip the checkpoint."""
    bounded.append(process := started("twice"))
    wait_for(process, "ready")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert next(process.stdout) == "asked\n"
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert next(process.stdout) == "at once\n"
    assert process.wait(LIMIT_S) == 128 + signal.SIGINT


@pytest.mark.parametrize("ignored", signals.FROM_TERMINAL, ids=lambda number: number.name)
def test_what_nohup_ignores_stays_ignored(
    ignored: signal.Signals, bounded: list[subprocess.Popen[str]]
) -> None:
    bounded.append(process := started(ignoring=ignored))
    wait_for(process, "ready")
    process.send_signal(ignored)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 128 + signal.SIGTERM  # not the second one


def test_output_to_a_closed_terminal_is_no_error(
    bounded: list[subprocess.Popen[str]],
) -> None:
    """The kernel sends SIGHUP, and each write from then on would raise OSError (EIO)."""
    terminal, end = pty.openpty()
    program = [
        sys.executable,
        "-c",
        "import fcntl, sys, termios\nfcntl.ioctl(2, termios.TIOCSCTTY, 0)" + PROGRAM,
    ]
    process = subprocess.Popen(
        program,
        stdin=end,
        stdout=end,
        stderr=end,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    bounded.append(process)
    os.close(end)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(LIMIT_S) == 128 + signal.SIGHUP


def test_what_ray_starts_does_not_hear_the_terminal_and_sets_no_handler() -> None:
    before, mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with block_terminal_signals():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = subprocess.check_output(["/bin/cat", "/proc/self/status"], text=True)
    (blocked,) = (line for line in status.splitlines() if line.startswith("SigBlk"))
    held = int(blocked.split()[1], 16)
    assert all(held >> number - 1 & 1 for number in signals.FROM_TERMINAL)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_before_the_workers_start_the_first_signal_ends() -> None:
    def job() -> None:
        with signals.interrupt_on_first():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(LIMIT_S)

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        job()
    assert signals.exit_code() == 128 + signal.SIGTERM


def test_another_thread_counts_nothing_and_changes_nothing() -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    seen: list[object] = []

    def enter() -> None:
        with Interrupts():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(LIMIT_S)
    assert seen == list(handlers.values())

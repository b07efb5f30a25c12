"""Runs a Python program that nobody has read, in a child process with little to harm.

What holds it: a Python of its own without site packages, environment or standard input; an empty
folder; limits on processor time, memory, files and their size; a time limit, after which its whole
process group is killed; no network, by a namespace without one where the system allows it; and an
audit hook that refuses sockets, other processes, foreign code, and files elsewhere.

What this does not protect against: the audit hook is a fence for accidents, not for malice, for a
program can get around it from inside its own interpreter; there is no filter of system calls, the
program runs as the same user, and a fault in the kernel or in Python is open to it. A program can
also look for the word that tells the parent it has come to its end. Run what a stranger's model
wrote inside a container or a virtual machine. macOS sets no limit of memory; Windows has none of
this and is refused.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.errors import UserError

FILE_BYTES = 1 << 20
"""The largest file that a program may write, its output included."""

SHOWN_BYTES = 2000
"""Of what it wrote to its standard error."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Args:
        status: `passed` if it came to its end without an error.
        message: the last of its standard error.
        network: what keeps it from the network.
    """

    status: Literal["passed", "failed", "timeout"]
    message: str
    network: Literal["namespace", "hook"]


def run_program(code: str, *, seconds: float = 10.0, memory_bytes: int = 1 << 30) -> Outcome:
    """Runs a program to its end.

    A program that leaves early, by `sys.exit(0)` or otherwise, has not passed: what stands behind
    that, such as the tests, has not run.

    Args:
        code: the program.
        seconds: that it may take.
        memory_bytes: of address space.

    Raises:
        UserError: the system has no process groups and limits (`evaluate.no-sandbox`).
    """
    if os.name != "posix":
        raise UserError(
            "evaluate.no-sandbox",
            "metric code",
            found=f"a system ({os.name}) without limits for processes",
            expected="Linux or macOS",
        )
    with tempfile.TemporaryDirectory(prefix="tunesmith-sandbox-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(code, encoding="utf-8", errors="replace")
        return _run(folder, seconds, memory_bytes)


def _run(folder: Path, seconds: float, memory_bytes: int) -> Outcome:
    word = secrets.token_hex(16)
    settings = [str(int(seconds) + 1), str(memory_bytes), str(FILE_BYTES)]
    command = [sys.executable, "-I", "-S", "-B", "-c", _GUARD, *settings]
    with (folder / "stderr").open("w+b") as errors, (folder / "stdout").open("w+b") as told:
        child = subprocess.Popen(  # noqa: S603  the command is our own
            command,
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=errors,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            child.communicate(word.encode(), timeout=seconds)
            is_late = False
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            _kill_group(child)
        lines = _tail(told.fileno()).split()
        message = _tail(errors.fileno()).strip()
    network = "namespace" if lines[:1] == ["namespace"] else "hook"
    if is_late or child.returncode == -signal.SIGXCPU:
        return Outcome("timeout", f"more than {seconds:g} s", network)
    is_passed = child.returncode == 0 and lines[-1:] == [word]
    return Outcome("passed" if is_passed else "failed", message, network)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """The child and all that it started and that has not left its group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    start = max(0, size - SHOWN_BYTES)
    return os.pread(descriptor, size - start, start).decode(errors="replace")


_GUARD = '''
import os, resource, runpy, sys

def limit():
    seconds, memory, size = (int(value) for value in sys.argv[1:4])
    most = {"CPU": seconds, "AS": memory, "FSIZE": size, "CORE": 0, "NOFILE": 64, "NPROC": 0}
    for name, value in most.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (OSError, ValueError):
            pass  # macOS knows no limit of address space

def leave_network():
    """Into a new user and network namespace: one without any device that is up."""
    try:
        import ctypes
        return ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000) == 0
    except (AttributeError, ImportError, OSError):
        return False

FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "os.fork", "os.exec", "os.posix_spawn",
    "os.spawn", "os.system", "os.kill", "os.chmod", "os.chown", "os.link", "os.symlink",
    "pty.", "signal.", "winreg.", "ftplib.", "smtplib.", "urllib.", "sys.addaudithook")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.")

def fence():
    home = os.path.realpath(os.getcwd())
    library = [os.path.realpath(path) for path in sys.path if path]
    devices = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime")
    readable = (home, *library, *devices)

    def is_inside(path, places):
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(real == place or real.startswith(place + os.sep) for place in places)

    def hook(event, values):
        if event.startswith(FORBIDDEN):
            raise PermissionError("not allowed in here: " + event)
        if event == "open" and values[0] is not None:
            path, mode, flags = values
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not is_inside(path, (home, "/dev/null") if writes else readable):
                raise PermissionError("not allowed in here: to open " + str(path))
        if event.startswith(CHANGES) and not all(
            is_inside(value, (home,)) for value in values if isinstance(value, (str, bytes))
        ):
            raise PermissionError("not allowed in here: " + event)

    sys.addaudithook(hook)

def main():
    word = sys.stdin.read()
    told = os.fdopen(os.dup(1), "w")
    has_left = leave_network()
    print("namespace" if has_left else "hook", file=told, flush=True)
    limit()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.argv[:] = ["program.py"]
    fence()
    runpy.run_path("program.py", run_name="__main__")
    print(word, file=told, flush=True)

main()
'''

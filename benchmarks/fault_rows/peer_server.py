"""Starts runs of one tool as children of a process that has imported it already.

    python peer_server.py hf|trl|llamafactory|tunesmith

Importing torch and a tool takes 5 to 20 s, a run one second. Nothing of torch is used before the
fork. Commands are lines on standard input: `start FOLDER` answers with a process id, `poll ID` with
an exit code (negative for a signal) or `busy`. A run works in its folder by `spec.json` there; what
it prints goes to `log.txt` through a pipe, so that a limit on the size of files leaves it alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from fault_rows.spec import Spec  # noqa: E402  (the folder above had to be found first)

WRITERS: dict[int, subprocess.Popen[bytes]] = {}
"""What writes the log of each run."""


def main() -> None:
    """Serves until the input ends."""
    train = import_module(f"fault_rows.peer_{sys.argv[1]}").train
    print("ready", flush=True)
    for line in sys.stdin:
        command, argument = line.split(maxsplit=1)
        if command == "start":
            print(start(train, Path(argument.strip())), flush=True)
        else:
            process, status = os.waitpid(int(argument), os.WNOHANG)
            if process:
                WRITERS.pop(process).wait(5)
            print(os.waitstatus_to_exitcode(status) if process else "busy", flush=True)


def start(train: Callable[[Spec], None], folder: Path) -> int:
    """Forks a run; returns its process id."""
    with (folder / "log.txt").open("wb") as log:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    assert writer.stdin is not None
    process = os.fork()
    if process:
        WRITERS[process] = writer
        writer.stdin.close()
        return process
    code = 1
    try:
        os.dup2(writer.stdin.fileno(), 1)
        os.dup2(writer.stdin.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        train(Spec.read(folder / "spec.json"))
        code = 0
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (the edge of a process)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

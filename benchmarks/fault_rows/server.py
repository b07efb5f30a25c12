"""Processes at work: forked by a server that has imported their tool already (peer_server.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from fault_rows.spec import Outcome, Spec

TIMEOUT_SECONDS = 90.0

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "240",
}


class Server:
    """Starts the runs of one tool.

    Args:
        kind: hf, trl, llamafactory or tunesmith.
        python: of an environment that has it.
        folder: for its caches and its own output.
    """

    def __init__(self, kind: str, python: str, folder: Path) -> None:
        self.kind, self.python, self.folder = kind, python, folder
        self._process: subprocess.Popen[str] | None = None

    def start(self, folder: Path, spec: Spec) -> Running:
        """Starts a run in a folder."""
        spec.write(folder / "spec.json")
        return Running(int(self.ask(f"start {folder}")), self, folder)

    def ask(self, line: str) -> str:
        """A command to the process, which is started by the first one."""
        if self._process is None:
            self._process = self._open()
            while self._read() != "ready":
                pass
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _open(self) -> subprocess.Popen[str]:
        caches = {
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "HF_HOME": str(self.folder),
            "TUNESMITH_CACHE": str(self.folder / "cache"),
        }
        script = str(Path(__file__).with_name("peer_server.py"))
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [self.python, script, self.kind],
                env={**os.environ, **ENVIRONMENT, **caches},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _read(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the server of {self.kind} ended:\n{text[-2000:]}")
        return line.strip()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(20)


@dataclass
class Running:
    """A run that a server has forked."""

    pid: int
    server: Server
    folder: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or None."""
        if self.code is None:
            answer = self.server.ask(f"poll {self.pid}")
            self.code = None if answer == "busy" else int(answer)
        return self.code

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Outcome:
        """Waits; kills it when the time is over."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.01)
        log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return Outcome(code, log)

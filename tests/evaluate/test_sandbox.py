"""What programs may do in the sandbox, and what they may not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tunesmith.evaluate.sandbox import run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no process groups and limits here")


def test_programs_pass_that_come_to_their_end() -> None:
    code = "import json, math, collections\nprint('x' * 10**7)\nopen('own', 'w').write('a')"
    assert run_program(code).status == "passed"


FAILING = [
    ("assert 1 == 2", "AssertionError"),
    ("import sys; sys.exit(0)\nassert False", ""),
    ("import socket; socket.socket()", "not allowed in here: socket"),
    ("open('/etc/passwd')", "not allowed in here: to open /etc/passwd"),
]
MORE_FAILING = [
    ("import os; os._exit(0)\nassert False", ""),
    ("x = 'a' * (1 << 33)", "MemoryError"),
    ("open('big', 'w').write('a' * (1 << 22))", "File too large"),
    ("import os; os.fork()", "not allowed in here: os.fork"),
    ("import subprocess; subprocess.run(['ls'])", "not allowed in here"),
    ("import os; os.kill(os.getppid(), 9)", "not allowed in here: os.kill"),
    ("import os; os.mkdir('/tmp/made-inside')", "not allowed in here: os.mkdir"),
    ("import ctypes; ctypes.CDLL(None)", "not allowed in here: ctypes"),
    ("import numpy", "No module named 'numpy'"),
    ("def f(:", "SyntaxError"),
]


@pytest.mark.parametrize(
    ("code", "said"),
    [*FAILING, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FAILING)],
)
def test_programs_fail_that_break_a_rule(code: str, said: str) -> None:
    outcome = run_program(code)
    assert outcome.status == "failed" and said in outcome.message


def test_time_is_limited_and_nothing_is_left() -> None:
    before = {*Path("/tmp").glob("tunesmith-sandbox-*")}
    start = time.monotonic()
    for code in ("import time; time.sleep(60)", "while True: pass"):
        assert run_program(code, seconds=0.3).status == "timeout"
    assert time.monotonic() - start < 3
    assert {*Path("/tmp").glob("tunesmith-sandbox-*")} <= before


def test_there_is_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert run_program("import os; assert 'SECRET_TOKEN' not in os.environ").status == "passed"

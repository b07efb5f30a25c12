"""The row of the fault matrix about secrets: planted everywhere, found nowhere."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.cli.console import redact_logs

# Joined at run time, so that no scanner takes this file for a leak.
ENVIRONMENT = {
    "HF_TOKEN": "hf" + "_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12345678",
    "TUNESMITH_TOKEN": "plantedtune" + "smithsecret",
    "WANDB_API_KEY": "0f1e2d3c4b5a" + "69788796a5b4c3d2e1f00112",
    "MODELSCOPE_API_TOKEN": "ms" + "-planted-modelscope-token",
    "DB_PASSWORD": 'pl@nted "pass/word" \\ 密',
}
IN_ADDRESS = "planted4ddress" + "pass"
IN_PARAMETER = "planted" + "parameter"
IN_OVERRIDE = "hf" + "_" + "PlantedOverride0123456789abcdefgh"
PLANTED = [*ENVIRONMENT.values(), IN_ADDRESS, IN_PARAMETER, IN_OVERRIDE]
ADDRESS = f"https://me:{IN_ADDRESS}@host"


def spellings(secret: str) -> set[bytes]:
    """How files of ours may have it."""
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {text.encode() for text in {secret, *escaped}}


def leaks_in(content: bytes) -> list[str]:
    """Which planted secrets, or telling pieces of them, a text has."""
    pieces = [*PLANTED, "pass/word"]
    return [each for each in pieces if any(form in content for form in spellings(each))]


@dataclass
class Workplace:
    """A folder to run commands in, with its own cache and home."""

    folder: Path
    outputs: dict[str, bytes]

    def run(self, name: str, *arguments: str, **environment: str) -> int:
        """Runs `tunesmith`, keeps what it prints, and gives its exit code."""
        home = str(self.folder / "home")
        own = {"TUNESMITH_CACHE": str(self.folder / "cache"), "HOME": home, "HF_HOME": home}
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *arguments],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, **own, **environment},
            capture_output=True,
            timeout=300,
        )
        self.outputs |= {f"{name}: stdout": done.stdout, f"{name}: stderr": done.stderr}
        return done.returncode

    def leaks(self) -> dict[str, list[str]]:
        """Outputs and files with a planted secret in them or in their name."""
        # Once more without line ends: the console breaks long lines, secrets in them, too.
        printed = {name: text + text.replace(b"\n", b"") for name, text in self.outputs.items()}
        found = {name: leaks_in(text) for name, text in printed.items()}
        for part in ("run", "cache", "home"):
            for path in sorted((self.folder / part).rglob("*")):
                name = str(path.relative_to(self.folder))
                content = path.read_bytes() if path.is_file() else b""
                found[name] = leaks_in(name.encode() + b"\n" + content)
        return {name: leaks for name, leaks in found.items() if leaks}

    def show(self) -> str:
        """What was printed, for a failed test."""
        return "\n".join(f"--- {name}\n{text.decode()}" for name, text in self.outputs.items())


@pytest.fixture
def workplace(tmp_path: Path, tiny_recipe: Callable[..., Path]) -> Workplace:
    """A recipe whose data lies behind what looks like an address with a password."""
    recipe = tiny_recipe(output="run", data={"train": f"{ADDRESS}/data.jsonl"})
    place = tmp_path / "https:" / f"me:{IN_ADDRESS}@host"
    place.mkdir(parents=True)
    (recipe.parent / "data.jsonl").rename(place / "data.jsonl")
    (tmp_path / "home").mkdir()
    return Workplace(tmp_path, {})


SOURCE = f'{{path: "{ADDRESS}/data.jsonl", name: "set?access_token={IN_PARAMETER}"}}'


@pytest.mark.slow
def test_row_65_planted_secrets_of_a_whole_run(workplace: Workplace) -> None:
    """Environment, address, override; stopped, gone on, finished: no secret in any output."""
    arguments = ["train", "recipe.yaml", f"data.train={SOURCE}"]
    stopped = workplace.run("first", *arguments, TUNESMITH_FAULT="step.update:5:term")
    assert stopped == 143, workplace.show()
    assert workplace.run("second", *arguments) == 0, workplace.show()
    assert (workplace.folder / "run" / "summary.json").exists()
    assert workplace.leaks() == {}


FAILURES: dict[str, tuple[list[str], dict[str, str]]] = {
    "no such data": ([f"data.train={ADDRESS}/missing.jsonl"], {}),
    "no such value": ([f"train.learning_rate={IN_OVERRIDE}"], {}),
    "no such key": ([f"train.token={IN_OVERRIDE}"], {}),
    "no such model": ([f"model={ADDRESS}/model"], {}),
    "no such hub": (["data.train=hf:org/set"], {"HF_ENDPOINT": f"http://me:{IN_ADDRESS}@127.0.0.1:9"}),
    "a crash": ([], {"TUNESMITH_FAULT": "step.update:3:raise:RuntimeError"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "flags"),
    [("no such value", []), *((failure, ["--debug"]) for failure in FAILURES)],
)
def test_row_65_planted_secrets_of_a_failed_run(
    workplace: Workplace, failure: str, flags: list[str]
) -> None:
    """What is said of an error, with and without its traceback: no secret."""
    overrides, environment = FAILURES[failure]
    online = {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    arguments = [*flags, "train", "recipe.yaml", *overrides]
    code = workplace.run(failure, *arguments, **online, **environment)
    assert code, workplace.show()
    assert workplace.leaks() == {}, workplace.show()


# Logs of libraries


@pytest.fixture
def restored_logging() -> Iterator[None]:
    factory = logging.getLogRecordFactory()
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(False)
    logging.setLogRecordFactory(factory)


@pytest.fixture
def logged(restored_logging: None) -> io.StringIO:
    """What a library's logger writes with a handler of its own."""
    stream = io.StringIO()
    redact_logs()
    redact_logs()
    logger = logging.getLogger("some.library")
    logger.handlers[:] = [logging.StreamHandler(stream)]
    logger.propagate = False
    return stream


class Address:
    """An object whose text has a password."""

    def __str__(self) -> str:
        return f"{ADDRESS}/x"


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (f"GET {ADDRESS}/x", (), "GET https://***@host/x\n"),
        ("GET %s in %d s", (Address(), 3), "GET https://***@host/x in 3 s\n"),
        ("GET %(url)s", ({"url": f"{ADDRESS}/x"},), "GET https://***@host/x\n"),
        ("100 % of", (Address(),), None),
        ("%d steps, 100 %%", (3,), "3 steps, 100 %\n"),
    ],
)
def test_row_65_logs_of_libraries(
    text: str, arguments: tuple[object, ...], expected: str | None, logged: io.StringIO
) -> None:
    """Secrets in a log's text or arguments: masked, whoever handles the record."""
    logging.getLogger("some.library").error(text, *arguments)
    assert expected is None or logged.getvalue() == expected
    assert IN_ADDRESS not in logged.getvalue()


def test_row_65_tracebacks_in_logs(logged: io.StringIO) -> None:
    """Secrets in a traceback that is logged: masked."""
    try:
        raise OSError(f"no answer from {ADDRESS}")
    except OSError:
        logging.getLogger("some.library").exception("failed")
    assert "OSError: no answer from https://***@host\n" in logged.getvalue()
    assert IN_ADDRESS not in logged.getvalue()


def test_row_65_warnings(restored_logging: None, caplog: pytest.LogCaptureFixture) -> None:
    """Secrets in a warning: masked."""
    redact_logs()
    warnings.simplefilter("always")
    warnings.warn(f"slow answer from {ADDRESS}", UserWarning, stacklevel=1)
    assert "slow answer from https://***@host" in caplog.text
    assert IN_ADDRESS not in caplog.text

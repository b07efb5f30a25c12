"""Kill it anywhere: the same command goes on to the same bits. Tolerance zero."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_tiny_recipe
from engine.runs import final_bytes, run_and_stop, run_to_end
from tunesmith import fine_tune, load_recipe
from tunesmith.engine.rundir import RunDirectory, open_run
from tunesmith.errors import CheckpointError, LockError, RunError
from tunesmith.types import Event


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tunesmith", "train", str(recipe), f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (output.parent / "child.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_step(child: subprocess.Popen[bytes], output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        events = output / "events.jsonl"
        if events.exists() and f'"event": "step", "step": {step},' in events.read_text():
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def oracle(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    """A recipe (with dropout) and the bytes of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("oracle")
    recipe = write_tiny_recipe(folder, tiny_model_folder)
    output = folder / "oracle"
    child = start(recipe, output)
    assert child.wait(120) == 0, (folder / "child.log").read_text()
    return recipe, final_bytes(output)


@pytest.mark.slow
def test_two_runs_are_equal_and_learn(
    oracle: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    recipe, expected = oracle
    child = start(recipe, tmp_path / "again")
    assert child.wait(120) == 0
    assert final_bytes(tmp_path / "again") == expected
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_before"]


@pytest.mark.slow
def test_sigkill_once(oracle: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    recipe, expected = oracle
    output = tmp_path / "killed"
    child = start(recipe, output)
    wait_for_step(child, output, 7)
    child.kill()
    child.wait()
    assert not (output / "summary.json").exists()
    child = start(recipe, output)
    assert child.wait(120) == 0
    assert final_bytes(output) == expected
    assert '"event": "resume"' in (output / "events.jsonl").read_text()


@pytest.mark.slow
def test_sigkill_at_random_moments(oracle: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    recipe, expected = oracle
    rng = random.Random(os.environ.get("TUNESMITH_SEED", "0"))
    output = tmp_path / "killed"
    kills = 0
    for attempt in range(12):
        child = start(recipe, output)
        wait_for_step(child, output, rng.randint(1, 18))
        time.sleep(rng.random() * 0.05)
        if child.poll() is None:
            child.kill()
            kills += 1
        child.wait()
        if (output / "summary.json").exists():
            break
        if attempt % 4 == 3 and (output / "checkpoints").exists():
            for left in (output / "checkpoints").glob(".tmp-*"):
                assert left.is_dir()  # a half save is never under a checkpoint's name
    child = start(recipe, output)
    assert child.wait(120) == 0
    assert kills >= 2
    assert final_bytes(output) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signals_save_and_say_how_to_go_on(
    oracle: tuple[Path, dict[str, bytes]], tmp_path: Path, number: int, code: int
) -> None:
    recipe, expected = oracle
    output = tmp_path / "stopped"
    child = start(recipe, output)
    wait_for_step(child, output, 4)
    child.send_signal(number)
    assert child.wait(60) == code
    log = (tmp_path / "child.log").read_text()
    assert "same command again" in log
    assert "Traceback" not in log
    assert sorted((output / "checkpoints").glob("step-*"))
    child = start(recipe, output)
    assert child.wait(120) == 0
    assert final_bytes(output) == expected


# In process from here on: faster, and equal to the child's bits only among themselves.


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        pytest.param("optim.safetensors", marks=SLOW),
        pytest.param("state.json", marks=SLOW),
    ],
)
def test_a_truncated_newest_checkpoint_is_skipped(
    tiny_recipe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    recipe = tiny_recipe()
    run_to_end(recipe, tmp_path / "whole")
    output = tmp_path / "torn"
    run_and_stop(recipe, output, 8)
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000008"
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[: len(data) // 2])
    events: list[Event] = []
    run_to_end(recipe, output, listeners=[events.append])
    warning = next(event for event in events if event.kind == "warning")
    assert "step-00000008" in str(warning.data["message"])
    assert name in str(warning.data["message"])
    resume = next(event for event in events if event.kind == "resume")
    assert 0 < resume.step < 8
    assert (output / "checkpoints" / "step-00000008.corrupt").is_dir()
    assert final_bytes(output) == final_bytes(tmp_path / "whole")


def test_one_flipped_bit_is_noticed_and_all_corrupt_stops(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    output = tmp_path / "run"
    run_and_stop(recipe, output, 8)
    for path in (output / "checkpoints").glob("step-*"):
        file = path / "optim.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        run_to_end(recipe, output)


@pytest.mark.slow
def test_restart_keeps_the_old_run_aside(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    output = tmp_path / "run"
    run_to_end(recipe, output)
    before = final_bytes(output)
    run_to_end(recipe, output, restart=True)
    assert final_bytes(output) == before
    assert len(list(tmp_path.glob("run.2*"))) == 1


def test_a_finished_run_is_not_trained_again(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    first = run_to_end(recipe, tmp_path / "run")
    events: list[Event] = []
    assert run_to_end(recipe, tmp_path / "run", listeners=[events.append]) == first
    assert events == []


def test_changed_recipe_and_data_are_refused(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    output = tmp_path / "run"
    run_and_stop(recipe, output, 5)
    with pytest.raises(RunError, match=r"train\.learning_rate: 0\.01 -> 0\.5"):
        fine_tune(load_recipe(recipe, [f"output={output}", "train.learning_rate=0.5"]))
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("answer 4", "answer 5", 1))
    with pytest.raises(RunError, match=r"run\.data-changed"):
        run_to_end(recipe, output)


def test_harmless_changes_are_allowed(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    output = tmp_path / "run"
    run_and_stop(recipe, output, 5)
    _, summary = fine_tune(load_recipe(recipe, [f"output={output}", "log.every_steps=2"]))
    assert summary["steps"] == 20


def test_a_folder_with_other_things_is_left_alone(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"run\.foreign"):
        run_to_end(tiny_recipe(), output)
    assert (output / "thesis.txt").read_text() == "precious"


def test_two_runs_cannot_share_a_directory(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from tunesmith.io.lock import directory_lock

    output = tmp_path / "run"
    output.mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tunesmith.io.lock import directory_lock\n"
        "with directory_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=str(child.pid)):
            run_to_end(tiny_recipe(), output)
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    with directory_lock(output):
        pass


def test_rotation_keeps_the_newest_and_the_best(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    # A rate so high that validation gets worse after the first epochs.
    recipe = tiny_recipe(train={"learning_rate": 0.5, "schedule": "constant"})
    summary = run_to_end(recipe, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    best = f"step-{summary['best_step']:08d}"
    kept = {"step-00000018", "step-00000020"}
    for name in list(
        kept
    ):  # each kept checkpoint can still be finished from: its own best is there
        state = json.loads((tmp_path / "run" / "checkpoints" / name / "state.json").read_text())
        kept.add(f"step-{state['best_step']:08d}")
    assert best in kept
    assert set(names) == kept
    result = (tmp_path / "run" / "model" / "adapter_model.safetensors").read_bytes()
    kept = tmp_path / "run" / "checkpoints" / best / "adapter_model.safetensors"
    assert result == kept.read_bytes()
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_not_exported(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    # Best early, then worse: the result must come from the best checkpoint, or be said not to.
    recipe = tiny_recipe(
        train={"learning_rate": 0.5, "schedule": "constant", "epochs": 30},
        evaluate={"every": 2, "early_stopping": 2},
    )
    output = tmp_path / "run"

    best: list[int] = []

    def damage(event: Event) -> None:
        if event.kind == "evaluation" and event.data["best"]:
            best.append(event.step)
        if event.kind == "step" and best and event.step == best[-1] + 4:
            folder = output / "checkpoints" / f"step-{best[-1]:08d}"
            (folder / "adapter_model.safetensors").write_bytes(b"")

    events: list[Event] = []
    run_to_end(recipe, output, listeners=[damage, events.append])
    warnings = [str(event.data["message"]) for event in events if event.kind == "warning"]
    assert any("best checkpoint" in text for text in warnings)
    last = sorted((output / "checkpoints").glob("step-*"))[-1] / "adapter_model.safetensors"
    assert (output / "model" / "adapter_model.safetensors").read_bytes() == last.read_bytes()


def test_harmless_changes_take_effect(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    output = tmp_path / "run"
    run_and_stop(recipe, output, 5)
    events: list[Event] = []
    loaded = load_recipe(recipe, [f"output={output}", "log.every_steps=5", "checkpoint.keep=1"])
    fine_tune(loaded, listeners=[events.append])
    assert [event.step for event in events if event.kind == "step"] == [10, 15, 20]


def test_a_run_may_move_with_its_data_but_not_change_its_base(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(tiny_model_folder, folder / "base")
    write_tiny_recipe(folder, Path("base"), data={"train": "data.jsonl"})
    run_and_stop(folder / "recipe.yaml", folder / "run", 5)
    moved = folder.rename(tmp_path / "there")
    config = json.loads((moved / "base" / "config.json").read_text())
    (moved / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(RunError, match="base model"):
        run_to_end(moved / "recipe.yaml", moved / "run")
    (moved / "base" / "config.json").write_text(json.dumps(config))
    assert run_to_end(moved / "recipe.yaml", moved / "run")["steps"] == 20


def test_a_start_that_died_while_loading_begins_again(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "run", tiny_recipe(train={"max_steps": 2})

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tunesmith.train.build_model", die)
        run_to_end(recipe, output)
    assert run_to_end(recipe, output)["steps"] == 2


@pytest.mark.parametrize("name", ["summary.json", "recipe.yaml"])
def test_a_damaged_file_of_the_run_is_named(
    tiny_recipe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / name).write_text("{: broken")
    if name == "summary.json":
        recipe = load_recipe(tiny_recipe(), [f"output={output}"]).recipe
        RunDirectory(output).save_recipes(recipe, recipe, {})
    with pytest.raises(RunError, match=rf"{name}: run\.damaged"):
        open_run(load_recipe(tiny_recipe(), [f"output={output}"]).recipe).summary  # noqa: B018

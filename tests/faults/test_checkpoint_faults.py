"""Damaged checkpoints and full disks: an older good one is used, or what is missing is said."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from faults.runs import KILLED, Place, train_to_the_end
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.state import TrainState
from tunesmith.errors import DiskError

slow = pytest.mark.slow


@pytest.fixture
def stopped(place: Place) -> Place:
    """A run that died at step 13, with checkpoints of steps 9 and 12 and the best one."""
    assert place.train(fault="step.micro:step=13:kill") == KILLED, place.printed[-2000:]
    return place


def goes_on_from_the_one_before(stopped: Place, oracle: Place, said: str) -> None:
    newest = stopped.checkpoints[-1]
    train_to_the_end(stopped)
    assert stopped.final_bytes() == oracle.final_bytes()
    warnings = [event["message"] for event in stopped.events_of("warning")]
    assert any(newest.name in text and said in text for text in warnings), warnings
    resumed = stopped.events_of("resume")[-1]
    assert resumed["step"] < int(newest.name.removeprefix("step-"))
    # What was damaged is kept aside, for whoever wants to look.
    assert newest.with_name(f"{newest.name}.corrupt").is_dir()


@slow
def test_row_17_an_empty_newer_directory(stopped: Place, oracle: Place) -> None:
    """An empty directory that is newer than the last checkpoint: passed over with a warning."""
    (stopped.output / "checkpoints" / "step-00000099").mkdir()
    goes_on_from_the_one_before(stopped, oracle, "no manifest")


FILES = ("adapter_model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json")


@slow
@pytest.mark.parametrize(
    "name",
    [FILES[1], *(pytest.param(f, marks=pytest.mark.whole) for f in (*FILES[:1], *FILES[2:]))],
)
def test_row_18_the_newest_checkpoint_is_truncated(
    stopped: Place, oracle: Place, name: str
) -> None:
    """A file of the newest checkpoint is cut off: the one before is used, the bad one kept."""
    file = stopped.checkpoints[-1] / name
    os.truncate(file, file.stat().st_size // 2)
    said = "manifest cannot be read" if name == "MANIFEST.json" else f"{name} has"
    goes_on_from_the_one_before(stopped, oracle, said)


def flip(file: Path, place: int = -7) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


@slow
def test_row_19_one_flipped_bit_in_the_weights(stopped: Place, oracle: Place) -> None:
    """A bit of the newest weights is turned: noticed by its hash, the one before is used."""
    flip(stopped.checkpoints[-1] / "adapter_model.safetensors")
    goes_on_from_the_one_before(stopped, oracle, "adapter_model.safetensors has changed")


@slow
def test_row_20_one_flipped_bit_in_the_optimizer(stopped: Place, oracle: Place) -> None:
    """A bit of the newest optimizer states is turned: noticed by its hash."""
    flip(stopped.checkpoints[-1] / "optim.safetensors")
    goes_on_from_the_one_before(stopped, oracle, "optim.safetensors has changed")


@slow
def test_row_21_all_checkpoints_are_bad(stopped: Place) -> None:
    """No checkpoint is whole: exit 3 with every reason; never a silent start from zero."""
    num_bad = len(stopped.checkpoints)
    for checkpoint in stopped.checkpoints:
        flip(checkpoint / "optim.safetensors")
    assert stopped.train() == 3
    assert "checkpoint.all-corrupt" in stopped.printed
    assert stopped.printed.count("has changed since it was saved") >= num_bad
    # The next start must not find an empty folder and begin anew either.
    assert stopped.train() == 3
    assert stopped.train("--restart") == 0


@slow
@pytest.mark.parametrize("point", ["save.write", "save.fsync", "save.rename"])
def test_row_22_the_disk_is_full_in_a_save(place: Place, oracle: Place, point: str) -> None:
    """A write of one save finds no space: tried once more after rotation, the run is the same."""
    assert place.train(fault="step.micro:step=2:kill") == KILLED  # the token store is made
    assert place.train(fault=f"{point}:2:enospc") == 0, place.printed[-3000:]
    assert place.final_bytes() == oracle.final_bytes()
    warnings = [event["message"] for event in place.events_of("warning")]
    assert any("could not be saved" in text and "once more" in text for text in warnings)


@slow
def test_row_22_the_disk_stays_full(place: Place, oracle: Place) -> None:
    """It is full for good: exit 6 with the bytes needed, older checkpoints whole; then equal."""
    assert place.train(fault="save.write:step=9:enospc") == 6
    assert "disk.full" in place.printed
    assert "room for" in place.printed
    assert "KiB" in place.printed
    assert not list(place.output.rglob(".tmp-*"))
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()


@slow
def test_row_22_a_real_limit_of_the_system(place: Place) -> None:
    """No file may be larger than 14 kB (RLIMIT_FSIZE): exit 6, nothing half-written is left."""
    assert place.train(fault="step.micro:step=2:kill") == KILLED  # the token store is made
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = place.train("log.every_steps=1000", TEST_FILE_LIMIT="14000")
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == old
    assert code == 6, place.printed[-3000:]
    assert "disk.full" in place.printed
    assert not list(place.output.rglob(".tmp-*"))


class NoOptimizer:
    """An optimizer that remembers nothing."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError


class NoWeights:
    """Weights of a size that is only said."""

    num_bytes = 50 << 20

    def writer(self, *, copies: bool) -> Callable[[Path], None]:
        return lambda folder: None

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def test_row_23_the_disk_is_too_small_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less free than a checkpoint needs: refused before the first step, with needed and free."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20 << 20))
    with pytest.raises(DiskError) as caught:
        Checkpoints(tmp_path / "checkpoints", 2, NoWeights(), NoOptimizer()).require_space()
    assert caught.value.code == "disk.full"
    assert "20.0 MiB" in caught.value.found
    assert "60.0 MiB" in caught.value.expected
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=61 << 20))
    Checkpoints(tmp_path / "checkpoints", 2, NoWeights(), NoOptimizer()).require_space()


@slow
def test_row_25_a_save_in_the_background_fails(place: Place, oracle: Place) -> None:
    """The writing thread fails: told as a warning, tried once more, and the run is the same."""
    more = "checkpoint.background=true"
    assert place.train(more, fault="save.open:5:raise:OSError") == 0, place.printed[-3000:]
    assert any("once more" in event["message"] for event in place.events_of("warning"))
    assert place.final_bytes() == oracle.final_bytes()


def test_row_25_a_failure_that_stays_surfaces(tmp_path: Path) -> None:
    """The second try fails, too: the error comes out where training asks for the checkpoint."""
    checkpoints = Checkpoints(
        tmp_path / "file" / "x", 2, NoWeights(), NoOptimizer(), in_background=True
    )
    checkpoints.folder.mkdir(parents=True)
    checkpoints.begin(TrainState({}, step=1), is_scheduled=True)
    assert checkpoints.collect(print, wait=True) is not None
    shutil.rmtree(tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    save = checkpoints.begin
    with pytest.raises(OSError, match=r"file"):
        save(TrainState({}, step=2), is_scheduled=True)
        checkpoints.collect(said.append, wait=True)


@slow
def test_row_26_two_runs_in_one_directory(place: Place) -> None:
    """A second start in the same directory is refused with the first one's process id; exit 7."""
    first = place.start(fault="step.micro:step=5:sleep:8")
    first.wait_for('"event": "step", "step": 5', place.output / "events.jsonl")
    second = Place(place.recipe, place.output)
    assert second.train() == 7
    assert "lock.held" in second.printed
    assert str(first.process.pid) in second.printed
    assert first.wait() == 0


@slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_row_27_read_only_output(place: Place) -> None:
    """The output cannot be written: refused before the model is loaded; exit 6."""
    parent = place.output.parent / "locked"
    parent.mkdir()
    parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    locked = Place(place.recipe, parent / "run")
    try:
        assert locked.train() == 6
    finally:
        parent.chmod(stat.S_IRWXU)


@slow
def test_row_27_output_under_a_file(place: Place) -> None:
    """The output cannot be made: refused before the model is loaded; exit 6."""
    (place.output.parent / "file").write_text("")
    log = place.output.parent / "log"
    from faults.runs import tunesmith

    output = place.output.parent / "file" / "run"
    assert tunesmith("train", str(place.recipe), f"output={output}", log=log) == 6
    text = log.read_text()
    assert "disk.write" in text
    assert "Loading" not in text


def test_states_keep_every_bit() -> None:
    """What a checkpoint says of the loop comes back as it was."""
    state = TrainState(
        {"data": "x"}, step=3, recent_losses=[(1, 0.1 + 0.2)], bad_steps=[(4, 5)], excluded=[7]
    )
    assert TrainState.from_json(state.to_json()) == state
    assert json.loads(state.to_json())["recent_losses"][0][1] == 0.1 + 0.2

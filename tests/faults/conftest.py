"""Fixtures of the fault matrix: a place to train in, and what an uninterrupted run gives there."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import write_tiny_recipe
from faults.runs import Place, train_to_the_end

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def make_place(tiny_model_folder: Path) -> Callable[..., Place]:
    """Makes a place with the tiny recipe (20 steps, dropout 0.1, a save every 3 steps)."""
    return partial(_make_place, tiny_model_folder)


def _make_place(model: Path, folder: Path, **changes: Any) -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    return Place(write_tiny_recipe(folder, model, **changes), folder / "run")


@pytest.fixture
def place(make_place: Callable[..., Place], tmp_path: Path) -> Place:
    """A place of the test's own."""
    return make_place(tmp_path)


@pytest.fixture(scope="session")
def oracle(make_place: Callable[..., Place], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The run that nothing happened to."""
    place = make_place(tmp_path_factory.mktemp("oracle"))
    train_to_the_end(place)
    return place

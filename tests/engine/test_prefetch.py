"""Batches made ahead in a thread: same order, errors with their traceback, no thread left."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tunesmith.engine.prefetch import Placed, Prefetch, map_tensors, prefetch_steps
from tunesmith.types import GlobalBatch, PackedBatch, Segments


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def count_to(limit: int, made: list[int]) -> Iterator[int]:
    for number in range(limit):
        made.append(number)
        yield number


def test_order_and_end() -> None:
    with Prefetch(iter(range(7)), Placed) as items:
        assert list(items) == list(range(7))
    with Prefetch(iter(range(0)), Placed) as items:
        assert list(items) == []
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_ahead(depth: int) -> None:
    made: list[int] = []
    with Prefetch(count_to(20, made), Placed, depth=depth) as items:
        for number in items:
            assert len(made) <= number + 1 + depth
            assert threads() != []


def test_the_next_is_made_while_this_one_is_used() -> None:
    is_made = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        yield 1
        is_made.set()
        yield 2

    with Prefetch(source(), Placed) as items:
        assert next(items) == 0
        assert is_made.wait(5)  # by the thread alone: nothing else was asked for


def test_an_error_comes_at_its_turn_with_its_traceback() -> None:
    def broken_reader(number: int) -> int:
        if number == 3:
            raise KeyError("row 3")
        return number

    with Prefetch((broken_reader(n) for n in range(9)), Placed) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="row 3") as caught:
            next(items)
    assert "broken_reader" in "".join(traceback.format_exception(caught.value))
    assert threads() == []


def test_leaving_early_leaves_no_thread() -> None:
    made: list[int] = []
    with pytest.raises(RuntimeError), Prefetch(count_to(1000, made), Placed) as items:
        next(items)
        raise RuntimeError("stopped")
    assert threads() == []
    assert len(made) <= 4


def tiny_batch(step: int) -> GlobalBatch:
    row = torch.tensor([step])
    names = ("ids_T", "position_T", "row_N", "target_N", "sample_N", "sequence_N", "group_GK")
    fields = dict.fromkeys((*names, "last_S", "label_G"), row)
    packed = PackedBatch(
        segments=Segments((1,)),
        weight_N=row.float(),
        num_tokens=1,
        loss_weight=1.0,
        columns_N={"advantage": row.float()},
        **fields,
    )
    return GlobalBatch(
        epoch=0,
        sample_ids=(step,),
        micro_batches=(packed,),
        supervised_weight=1.0,
        num_supervised=1,
        num_tokens=1,
    )


def test_batches_on_cpu_are_what_the_loader_gives() -> None:
    made = [tiny_batch(step) for step in range(5)]
    with prefetch_steps(made.__getitem__, range(2, 5), torch.device("cpu")) as batches:
        assert [batch is made[2 + index] for index, batch in enumerate(batches)] == [True] * 3


def test_every_tensor_of_a_batch_is_moved_and_nothing_else() -> None:
    batch = tiny_batch(3)
    moved = map_tensors((batch, 2.5), lambda tensor: tensor + 1)
    assert moved[1] == 2.5
    micro = moved[0].micro_batches[0]
    assert micro.ids_T.tolist() == micro.sample_N.tolist() == [4]
    assert micro.weight_N.tolist() == micro.columns_N["advantage"].tolist() == [4.0]
    assert micro.segments is batch.micro_batches[0].segments
    assert moved[0].sample_ids == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_cuda() -> None:
    device = torch.device("cuda")
    with prefetch_steps(tiny_batch, range(5), device) as batches:
        for step, batch in enumerate(batches):
            assert batch.micro_batches[0].ids_T.device.type == "cuda"
            assert batch.micro_batches[0].ids_T.tolist() == [step]


def test_an_unreadable_row_stops_a_run_and_its_thread(tiny_recipe: Callable[..., Path]) -> None:
    from engine.runs import make_run
    from tunesmith.engine.loop import fit
    from tunesmith.engine.state import TrainState
    from tunesmith.io.fault import arm

    with make_run(tiny_recipe(evaluate={"every": None})) as run:
        state = TrainState({})
        arm({"TUNESMITH_FAULT": "data.next:step=4:raise:OSError"})
        try:
            with pytest.raises(OSError, match=r"planted at data\.next"):
                fit(run, state)
        finally:
            arm({})
    assert state.step == 4
    assert threads() == []

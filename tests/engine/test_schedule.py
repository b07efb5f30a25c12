import math

import pytest

from tunesmith.config.recipe import TrainConfig
from tunesmith.engine.schedule import learning_rate_at, warmup_steps


def make(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"learning_rate": 1.0, "warmup": 0.0, **changes})


def test_warmup_rises_to_the_peak() -> None:
    train = make(warmup=4, schedule="constant")
    assert [learning_rate_at(train, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (0.0, 0), (5, 5), (1000, 100)])
def test_warmup_is_a_share_or_a_number(warmup: float, steps: int) -> None:
    assert warmup_steps(make(warmup=warmup), 100) == steps


def test_cosine_and_linear() -> None:
    cosine, linear = make(schedule="cosine"), make(schedule="linear")
    for step in range(8):
        expected = 0.5 * (1 + math.cos(math.pi * step / 8))
        assert learning_rate_at(cosine, step, 8) == pytest.approx(expected)
        assert learning_rate_at(linear, step, 8) == pytest.approx(1 - step / 8)


def test_transformers_has_the_same_cosine() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 20)
    train = make(warmup=3)
    for step in range(20):
        if step:
            optimizer.step()
            schedule.step()
        # transformers starts its warm-up at 0, which wastes the first step; ours is one ahead.
        if step >= 3:
            assert learning_rate_at(train, step, 20) == pytest.approx(schedule.get_last_lr()[0])


def test_an_unresolved_rate_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="resolve"):
        learning_rate_at(TrainConfig(), 0, 10)

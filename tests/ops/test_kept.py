import torch

from tunesmith.ops.kept import Kept, compute_once


def test_results_are_given_back_once() -> None:
    kept, runs = Kept(), list[int]()

    def compute() -> tuple[torch.Tensor, ...]:
        runs.append(len(runs))
        return torch.full((2,), float(runs[-1])), torch.ones(1)

    values = [kept.once(0, compute)[0][0].item() for _ in range(4)]
    assert values == [0, 0, 1, 2]
    assert runs == [0, 1, 2]


def test_results_have_numbers() -> None:
    kept = Kept()
    made = [kept.once(n, lambda n=n: (torch.tensor(n),)) for n in (0, 1)]
    again = [kept.once(n, lambda: (torch.tensor(9),)) for n in (0, 1)]
    assert [int(x) for (x,) in made + again] == [0, 1, 0, 1]


def test_kept_results_share_memory_and_have_no_history() -> None:
    kept = Kept()
    (made,) = kept.once(0, lambda: (torch.ones(3, requires_grad=True) * 2,))
    (again,) = kept.once(0, lambda: (torch.zeros(3),))
    assert again.data_ptr() == made.data_ptr()
    assert made.requires_grad and not again.requires_grad


def test_without_it_results_are_made_each_time() -> None:
    counts = iter(range(9))
    assert [int(compute_once(None, 0, lambda: (torch.tensor(next(counts)),))[0]) for _ in "ab"] == [
        0,
        1,
    ]

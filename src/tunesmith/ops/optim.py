"""Optimizers on flat buffers: an update of all parameters that asks the device for nothing.

Gradients and, where there are any, master copies of all parameters lie one after the other in one
buffer each. float32 parameters are views of such a buffer themselves. Parameters that are updated
alike are a group; its `Rule` (ops/rules/) changes its weights and keeps what it remembers.

Shape letters: F numbers in a flat buffer, P in a part of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from tunesmith.ops.optim_states import BLOCK, store

PART_CPU, PART = 2**16, 2**24
"""Numbers updated at once where wide temporaries are needed: 256 KiB of float32 each on CPU, which
stays in its cache, 64 MiB elsewhere, which keep an accelerator busy."""

NamedParameter = tuple[str, torch.nn.Parameter]


class Optimizer(Protocol):
    """What the engine wants of an optimizer.

    A step with bad numbers changes nothing but the count of updates: the device decides that by
    itself, and the host may find out later. `is_updating` is set by `step`; who has counted the
    step takes it back.
    """

    is_updating: bool

    def at_step(self, step: int) -> AbstractContextManager[None]:
        """Around forward and backward of a step, counted from 0: trained is what it updates."""
        ...

    def zero_grad(self) -> None:
        """Sets all gradients to 0 in place."""
        ...

    def clip(self, limit: float | None) -> torch.Tensor:
        """Scales gradients to a norm of at most `limit`; returns their norm before, a scalar."""
        ...

    def step(self, learning_rate: float, is_good: torch.Tensor) -> None:
        """Updates all parameters, unless `is_good`, a boolean scalar on the device, is false."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a restart needs, by name."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave; ValueError if it does not fit."""
        ...


@dataclass(frozen=True)
class Update:
    """What a rule is told of an update.

    Args:
        number: counted from 1.
        learning_rate: of this group.
        is_kept: a boolean scalar on the device; if true, weights and states must stay as they are.
        generator: of stochastic rounding.
    """

    number: int
    learning_rate: float
    is_kept: torch.Tensor
    generator: torch.Generator


class Rule(Protocol):
    """How the weights of one group are updated, and what is remembered for it."""

    def step(self, group: FlatGroup, update: Update) -> None:
        """Updates `group.weights_F` from `group.gradient_F`."""
        ...

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """What is remembered, as `<parameter>.<field>` and a view that can be written to."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where parameters lie in the flat buffers of their group; each starts at a whole block."""

    names: tuple[str, ...]
    parameters: tuple[torch.nn.Parameter, ...]
    starts: tuple[int, ...]
    size: int

    @property
    def parts(self) -> Iterator[tuple[str, torch.nn.Parameter, slice]]:
        """Name, parameter, and its place."""
        for name, parameter, start in zip(self.names, self.parameters, self.starts, strict=True):
            yield name, parameter, slice(start, start + parameter.numel())

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return self.parameters[0].device

    def views(self, flat_F: torch.Tensor) -> list[torch.Tensor]:
        """A flat buffer as one tensor for each parameter, of its shape."""
        return [flat_F[place].view(parameter.shape) for _, parameter, place in self.parts]


NewRule = Callable[[Layout], Rule]


@dataclass
class FlatGroup:
    """Parameters of one type that are updated alike and learn as fast, and their flat buffers.

    `weights_F` is the parameters' own memory, or their float32 master copy where `has_master`.
    `gradient_views` is what the parameters' `.grad` must be; it is empty with a master copy, whose
    gradients are added up by `hooks`.
    """

    layout: Layout
    weight_decay: float
    weights_F: torch.Tensor
    gradient_F: torch.Tensor
    rule: Rule
    has_master: bool
    gradient_views: list[torch.Tensor]
    hooks: list[RemovableHandle]
    rate_factor: float = 1.0
    """On the learning rate."""

    @property
    def slices(self) -> Iterator[slice]:
        """The buffers in pieces that are worked on at once."""
        most = part_size(self.gradient_F.device)
        for start in range(0, self.layout.size, most):
            yield slice(start, min(start + most, self.layout.size))


class FlatOptimizer:
    """An `Optimizer` over flat groups; made by `build_flat`.

    Not covered: gradients set to None from outside while the parameters are views, which `step`
    refuses.
    """

    def __init__(self, groups: Sequence[FlatGroup], seed: int) -> None:
        self.groups = list(groups)
        self.seed = seed
        self.num_updates = 0
        self.is_updating = False
        self._generator = torch.Generator(self.groups[0].gradient_F.device)

    @contextmanager
    def at_step(self, step: int) -> Generator[None]:
        """Nothing to do: every step updates all parameters."""
        yield

    def zero_grad(self) -> None:
        """Sets all gradients to 0 in place."""
        for group in self.groups:
            group.gradient_F.zero_()

    @torch.no_grad()
    def clip(self, limit: float | None) -> torch.Tensor:
        """Scales the gradients to a norm of at most `limit`; returns their norm before, a scalar.

        The same as torch.nn.utils.clip_grad_norm_ up to the order of summation.
        """
        norm = torch.linalg.vector_norm(
            torch.stack([flat_norm(group.gradient_F) for group in self.groups])
        )
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for group in self.groups:
                group.gradient_F.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float, is_good: torch.Tensor) -> None:
        """Updates all parameters, unless this step's numbers are bad.

        Args:
            learning_rate: of this step.
            is_good: a boolean scalar on the device.

        Raises:
            RuntimeError: a parameter's `.grad` was replaced by another tensor.
        """
        self.is_updating = True
        self.num_updates += 1
        is_kept = ~is_good
        self._generator.manual_seed(seed_from("rounding", self.seed, self.num_updates))
        for group in self.groups:
            _check_gradients(group)
            rate = learning_rate * group.rate_factor
            group.rule.step(group, Update(self.num_updates, rate, is_kept, self._generator))
            if group.has_master:
                self._publish(group, is_kept)

    def _publish(self, group: FlatGroup, is_kept: torch.Tensor) -> None:
        """Rounds the masters into the weights, stochastically.

        To nearest, updates far below the step between two bfloat16 numbers would not be seen by
        the model for many steps: pretrained weights lie on that grid. SmolLM2-135M, all weights,
        rate 2e-5, loss 4.24 before: after one update 3.11 in float32, 3.15 so, 4.13 to nearest.
        """
        most = part_size(is_kept.device)
        for _, parameter, place in group.layout.parts:
            targets = parameter.detach().view(-1).split(most)
            for target_P, master_P in zip(targets, group.weights_F[place].split(most), strict=True):
                store(target_P, master_P, is_kept, self._generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a restart needs, `<parameter>.<field>` and `num_updates`.

        Fields are the rules' own, such as `exp_avg` (with `.scale` if 8-bit), and `master`. They do
        not depend on how parameters are laid out.
        """
        return {"num_updates": torch.tensor(self.num_updates), **dict(self._views())}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave.

        Raises:
            ValueError: they are of another optimizer or other parameters.
        """
        views = dict(self._views())
        differing = {*views, "num_updates"} ^ set(tensors)
        differing |= (
            {name for name, v in views.items() if tensors[name].shape != v.shape}
            if not differing
            else set()
        )
        if differing:
            raise ValueError(f"optimizer states that do not fit: {sorted(differing)[:5]}")
        for name, view in views.items():
            view.copy_(tensors[name])
        self.num_updates = int(tensors["num_updates"])

    def release(self) -> None:
        """Lets go of all parameters: they keep their numbers, and have no gradient any more."""
        for group in self.groups:
            for hook in group.hooks:
                hook.remove()
            for parameter in group.layout.parameters:
                parameter.grad = None

    def state_bytes_per_parameter(self) -> dict[str, float]:
        """Bytes a parameter besides its weight: `gradient`, `master`, `states`; padding aside."""
        count = sum(p.numel() for group in self.groups for p in group.layout.parameters)
        sizes = {"gradient": 0, "master": 0, "states": 0}
        for group in self.groups:
            for _, _, place in group.layout.parts:
                sizes["gradient"] += group.gradient_F[place].nbytes
                sizes["master"] += group.weights_F[place].nbytes if group.has_master else 0
            sizes["states"] += sum(t.nbytes for _, t in group.rule.tensors(group.layout))
        return {name: size / max(1, count) for name, size in sizes.items()}

    def _views(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self.groups:
            yield from group.rule.tensors(group.layout)
            if group.has_master:
                for name, parameter, place in group.layout.parts:
                    yield f"{name}.master", group.weights_F[place].view(parameter.shape)


def part_size(device: torch.device) -> int:
    """Numbers that are worked on at once."""
    return PART_CPU if device.type == "cpu" else PART


def flat_norm(values_F: torch.Tensor) -> torch.Tensor:
    """The 2-norm of a flat buffer, a float32 scalar.

    In rows first: over 135 million numbers at once, torch's float32 sum on CPU is off by 1.4 %,
    because small numbers vanish in a large sum; in rows by 1e-9, and faster.
    """
    norms = [
        torch.linalg.vector_norm(torch.linalg.vector_norm(part_P.float().view(-1, BLOCK), dim=1))
        for part_P in values_F.split(part_size(values_F.device))
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def seed_from(*words: object) -> int:
    """A seed that depends on all words alone."""
    digest = hashlib.sha256(":".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter maps hidden states to hidden states: a matrix inside a numbered layer.

    Not so are embeddings, the head, norms and biases, for which rules about matrices are not made.
    """
    return len(shape) == 2 and re.search(r"\.\d+\.", name) is not None


# Building


@dataclass(frozen=True)
class Assignment:
    """Parameters that one kind of rule updates.

    Args:
        named: each parameter once, float32 or bfloat16, on one device.
        new_rule: makes the rule of a group of them.
    """

    named: Sequence[NamedParameter]
    new_rule: NewRule


@dataclass(frozen=True)
class FlatSettings:
    """What all groups share.

    Args:
        weight_decay: of matrices, decoupled (arXiv 1711.05101); vectors do not decay.
        keep_master: bfloat16 weights have a float32 copy that is updated in their place and rounded
            into them; without it they are updated themselves. Both round stochastically.
        seed: of stochastic rounding, together with the number of the update.
    """

    weight_decay: float = 0.0
    keep_master: bool = True
    seed: int = 0


def build_flat(
    assignments: Sequence[Assignment],
    settings: FlatSettings,
    rate_factors: Mapping[str, float] | None = None,
) -> FlatOptimizer:
    """Moves parameters and gradients into flat buffers; they stay the same objects.

    A model goes to its device before, not after. A parameter that gets no gradient in a step has
    one of 0: its moments fade and its weight decays, where torch would pass it over. While a group
    is moved, its weights are there twice.

    Args:
        assignments: what is trained, and by which rule.
        settings: of all.
        rate_factors: on the learning rate, of parameters for which it is not 1.

    Raises:
        ValueError: there are no parameters, or some of another type.
    """
    named = [item for assignment in assignments for item in assignment.named]
    wrong = [name for name, p in named if p.dtype not in (torch.float32, torch.bfloat16)]
    if wrong or not named:
        raise ValueError(f"parameters to train in float32 or bfloat16; not so: {wrong[:5]}")
    factors = rate_factors or {}

    def kind(item: NamedParameter) -> tuple[bool, str, float]:
        name, parameter = item
        return parameter.dim() > 1, str(parameter.dtype), factors.get(name, 1.0)

    groups: list[FlatGroup] = []
    for assignment in assignments:
        # Stable: the model's order within a group.
        ordered = sorted(assignment.named, key=kind, reverse=True)
        for (is_matrix, _, factor), members in groupby(ordered, key=kind):
            group = _build_group(list(members), assignment.new_rule, settings)
            decay = settings.weight_decay if is_matrix else 0.0
            groups.append(replace(group, weight_decay=decay, rate_factor=factor))
    return FlatOptimizer(groups, settings.seed)


def _build_group(
    named: Sequence[NamedParameter], new_rule: NewRule, settings: FlatSettings
) -> FlatGroup:
    layout = _lay_out(named)
    first = named[0][1]
    has_master = first.dtype == torch.bfloat16 and settings.keep_master
    make = partial(torch.zeros, layout.size, device=first.device)
    weights_F = make(dtype=torch.float32 if has_master else first.dtype)
    gradient_F = make(dtype=weights_F.dtype)
    gradient_views: list[torch.Tensor] = []
    hooks: list[RemovableHandle] = []
    weights, gradients = layout.views(weights_F), layout.views(gradient_F)
    for parameter, weight, gradient in zip(layout.parameters, weights, gradients, strict=True):
        weight.copy_(parameter.detach())
        if has_master:
            hooks.append(parameter.register_post_accumulate_grad_hook(_adder(gradient)))
        else:
            parameter.data, parameter.grad = weight, gradient
            gradient_views.append(gradient)
    rule = new_rule(layout)
    return FlatGroup(layout, 0.0, weights_F, gradient_F, rule, has_master, gradient_views, hooks)


def _lay_out(named: Sequence[NamedParameter]) -> Layout:
    starts: list[int] = []
    size = 0
    for _, parameter in named:
        starts.append(size)
        # Whole blocks: 8-bit states of a parameter then depend on it alone, and every parameter
        # stays aligned for vector loads.
        size += -(-parameter.numel() // BLOCK) * BLOCK
    names, parameters = zip(*named, strict=True)
    return Layout(names, parameters, tuple(starts), size)


def _adder(gradient: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a micro-batch's bfloat16 gradient to the float32 one and frees it."""

    def add(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            gradient.add_(parameter.grad)
            parameter.grad = None

    return add


def _check_gradients(group: FlatGroup) -> None:
    for name, parameter, view in zip(
        group.layout.names, group.layout.parameters, group.gradient_views, strict=False
    ):
        if parameter.grad is not view:
            raise RuntimeError(f"the gradient of {name} was replaced; use optimizer.zero_grad()")

"""AdamW on flat buffers: one update for all parameters, without asking the device for anything.

Gradients, moments and, where there are any, master copies of all parameters lie one after the other
in one buffer each. float32 parameters are views of such a buffer themselves. What torch's own
`AdamW(fused=True)` does to separate parameters, this does to the same bits: an elementwise update
does not depend on how its elements are grouped. On CPU all but the last `numel % 16` elements of a
parameter: torch computes those without vector instructions, which may round the last bit otherwise.

    weights      states      kept for each parameter besides its weight        update
    float32      float32     4 gradient, 8 moments                             torch's fused kernel
    bfloat16     float32     4 gradient, 4 master, 8 moments                   torch's fused kernel
    bfloat16     int8        4 gradient, 4 master, 2.03 moments                in parts
    bfloat16     bfloat16    2 gradient, 4 moments, no master                  in parts

Shape letters: F numbers in a flat buffer, P in a part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch.optim.adamw import adamw

from tunesmith.ops.optim_states import BLOCK, Moment, PlainMoment, StateKind, new_moment, store

PART_CPU, PART = 2**16, 2**24
"""Numbers updated at once where wide temporaries are needed: 256 KiB of float32 each on CPU, which
stays in its cache, 64 MiB elsewhere, which keep an accelerator busy."""

NamedParameter = tuple[str, torch.nn.Parameter]


@dataclass(frozen=True)
class AdamWSettings:
    """What defines the update (arXiv 1711.05101, algorithm 2).

    Args:
        weight_decay: of matrices; vectors do not decay.
        beta1: memory of the first moment.
        beta2: memory of the second moment.
        epsilon: added to the root of the second moment.
        states: numbers in which the moments are kept.
        keep_master: bfloat16 weights have a float32 copy that is updated in their place and rounded
            into them; without it they are updated themselves. Both round stochastically.
        seed: of stochastic rounding, together with the number of the update.
    """

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    states: StateKind = "float32"
    keep_master: bool = True
    seed: int = 0


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

    def views(self, flat_F: torch.Tensor) -> list[torch.Tensor]:
        """A flat buffer as one tensor for each parameter, of its shape."""
        return [flat_F[place].view(parameter.shape) for _, parameter, place in self.parts]


@dataclass
class FlatGroup:
    """Parameters of one type that decay alike and learn as fast, and their flat buffers.

    `weights_F` is the parameters' own memory, or their float32 master copy where `has_master`.
    `gradient_views` is what the parameters' `.grad` must be; it is empty with a master copy, whose
    gradients are added up by hooks.
    """

    layout: Layout
    weight_decay: float
    weights_F: torch.Tensor
    gradient_F: torch.Tensor
    first: Moment
    second: Moment
    has_master: bool
    gradient_views: list[torch.Tensor]
    rate_factor: float = 1.0
    """On the learning rate."""

    @property
    def is_fused(self) -> bool:
        """Whether torch's kernel can do it: it wants all numbers of one type."""
        moments = (self.first, self.second)
        buffers = [moment.values for moment in moments if isinstance(moment, PlainMoment)]
        return len(buffers) == 2 and all(
            buffer.dtype == torch.float32 for buffer in (self.weights_F, *buffers)
        )


class FlatAdamW:
    """AdamW over flat groups; made by `build_flat_adamw`.

    A step with bad numbers changes nothing but the count of updates: the device decides that by
    itself, and the host may find out later. A step sets `is_updating`; who has counted the step
    takes it back. Not covered: gradients set to None from outside while
    the parameters are views, which `step` refuses.
    """

    def __init__(self, groups: Sequence[FlatGroup], settings: AdamWSettings) -> None:
        self.groups = list(groups)
        self.settings = settings
        self.num_updates = 0
        self.is_updating = False
        device = self.groups[0].gradient_F.device
        self._is_skipped = torch.zeros((), device=device)
        self._generator = torch.Generator(device)

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
        self._is_skipped.copy_(~is_good)
        self._generator.manual_seed(_seed_of_update(self.settings.seed, self.num_updates))
        for group in self.groups:
            _check_gradients(group)
            rate = learning_rate * group.rate_factor
            if group.is_fused:
                self._step_fused(group, rate)
            else:
                self._step_in_parts(group, rate)
            if group.has_master:
                self._publish(group)

    def _step_fused(self, group: FlatGroup, learning_rate: float) -> None:
        settings, whole = self.settings, slice(None)
        adamw(
            [group.weights_F],
            [group.gradient_F],
            [group.first.tensors(whole)[""]],
            [group.second.tensors(whole)[""]],
            [],
            # The kernel counts this one up itself.
            [torch.full_like(self._is_skipped, self.num_updates - 1)],
            fused=True,
            found_inf=self._is_skipped,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=learning_rate,
            weight_decay=group.weight_decay,
            eps=settings.epsilon,
            maximize=False,
        )

    def _step_in_parts(self, group: FlatGroup, learning_rate: float) -> None:
        is_kept = self._is_skipped > 0
        most = part_size(is_kept.device)
        for start in range(0, group.layout.size, most):
            part = slice(start, min(start + most, group.layout.size))
            weights_P, first_P, second_P = adamw_update(
                group.weights_F[part].float(),
                group.gradient_F[part].float(),
                (group.first.read(part), group.second.read(part)),
                self.settings,
                learning_rate=learning_rate,
                weight_decay=group.weight_decay,
                num_updates=self.num_updates,
            )
            group.first.write(part, first_P, is_kept, self._generator)
            group.second.write(part, second_P, is_kept, self._generator)
            store(group.weights_F[part], weights_P, is_kept, self._generator)

    def _publish(self, group: FlatGroup) -> None:
        """Rounds the masters into the weights, stochastically.

        To nearest, updates far below the step between two bfloat16 numbers would not be seen by
        the model for many steps: pretrained weights lie on that grid. SmolLM2-135M, all weights,
        rate 2e-5, loss 4.24 before: after one update 3.11 in float32, 3.15 so, 4.13 to nearest.
        """
        is_kept, most = self._is_skipped > 0, part_size(self._is_skipped.device)
        for _, parameter, place in group.layout.parts:
            targets = parameter.detach().view(-1).split(most)
            for target_P, master_P in zip(targets, group.weights_F[place].split(most), strict=True):
                store(target_P, master_P, is_kept, self._generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a restart needs, `<parameter>.<field>` and `num_updates`.

        Fields: `exp_avg`, `exp_avg_sq` (with `.scale` if 8-bit) and `master`. They do not depend on
        how parameters are laid out.
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

    def state_bytes_per_parameter(self) -> dict[str, float]:
        """Bytes a parameter besides its weight: `gradient`, `master`, `moments`; padding aside."""
        count = sum(p.numel() for group in self.groups for p in group.layout.parameters)
        sizes = {"gradient": 0, "master": 0, "moments": 0}
        for group in self.groups:
            for _, _, place in group.layout.parts:
                sizes["gradient"] += group.gradient_F[place].nbytes
                sizes["master"] += group.weights_F[place].nbytes if group.has_master else 0
                for moment in (group.first, group.second):
                    sizes["moments"] += sum(t.nbytes for t in moment.tensors(place).values())
        return {name: size / max(1, count) for name, size in sizes.items()}

    def _views(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self.groups:
            for name, parameter, place in group.layout.parts:
                for field, moment in (("exp_avg", group.first), ("exp_avg_sq", group.second)):
                    for suffix, stored in moment.tensors(place).items():
                        shape = parameter.shape if not suffix else stored.shape
                        yield f"{name}.{field}{suffix}", stored.view(shape)
                if group.has_master:
                    yield f"{name}.master", group.weights_F[place].view(parameter.shape)


def part_size(device: torch.device) -> int:
    """Numbers that are worked on at once."""
    return PART_CPU if device.type == "cpu" else PART


def adamw_update(
    weights_P: torch.Tensor,
    gradient_P: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    settings: AdamWSettings,
    *,
    learning_rate: float,
    weight_decay: float,
    num_updates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW (arXiv 1711.05101, algorithm 2) written out, all in float32.

    Returns:
        (weights, first moment, second moment) after update number `num_updates`, counted from 1.
    """
    first_P, second_P = moments
    first_P = first_P.lerp(gradient_P, 1 - settings.beta1)
    second_P = (second_P * settings.beta2).addcmul_(
        gradient_P, gradient_P, value=1 - settings.beta2
    )
    correction1 = 1 - settings.beta1**num_updates
    correction2 = 1 - settings.beta2**num_updates
    root_P = (second_P / correction2).sqrt_().add_(settings.epsilon)
    weights_P = weights_P * (1 - learning_rate * weight_decay)
    weights_P.addcdiv_(first_P, root_P, value=-learning_rate / correction1)
    return weights_P, first_P, second_P


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


def bytes_per_parameter(states: StateKind, *, is_bf16: bool, keep_master: bool) -> float:
    """Bytes that training keeps for a parameter besides its weight, for plans of memory."""
    moments = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.0 + 2 * 4 / BLOCK}[states]
    if not is_bf16:
        return 4 + moments
    return (8 if keep_master else 2) + moments


def build_flat_adamw(
    named: Sequence[NamedParameter],
    settings: AdamWSettings,
    rate_factors: Mapping[str, float] | None = None,
) -> FlatAdamW:
    """Moves parameters and gradients into flat buffers; they stay the same objects.

    A model goes to its device before, not after. A parameter that gets no gradient in a step has
    one of 0: its moments fade and its weight decays, where torch would pass it over. While a group
    is moved, its weights are there twice.

    Args:
        named: what is trained, each parameter once, float32 or bfloat16, on one device.
        settings: of the update.
        rate_factors: on the learning rate, of parameters for which it is not 1.

    Raises:
        ValueError: there are no parameters, or some of another type.
    """
    wrong = [name for name, p in named if p.dtype not in (torch.float32, torch.bfloat16)]
    if wrong or not named:
        raise ValueError(f"parameters to train in float32 or bfloat16; not so: {wrong[:5]}")

    factors = rate_factors or {}

    def kind(item: NamedParameter) -> tuple[bool, str, float]:
        name, parameter = item
        return parameter.dim() > 1, str(parameter.dtype), factors.get(name, 1.0)

    ordered = sorted(named, key=kind, reverse=True)  # stable: the model's order within a group
    groups = [
        replace(
            _build_group(list(members), settings, settings.weight_decay if is_matrix else 0.0),
            rate_factor=factor,
        )
        for (is_matrix, _, factor), members in groupby(ordered, key=kind)
    ]
    return FlatAdamW(groups, settings)


def _build_group(
    named: Sequence[NamedParameter], settings: AdamWSettings, weight_decay: float
) -> FlatGroup:
    layout = _lay_out(named)
    first = named[0][1]
    has_master = first.dtype == torch.bfloat16 and settings.keep_master
    make = partial(torch.zeros, layout.size, device=first.device)
    weights_F = make(dtype=torch.float32 if has_master else first.dtype)
    gradient_F = make(dtype=weights_F.dtype)
    gradient_views: list[torch.Tensor] = []
    weights, gradients = layout.views(weights_F), layout.views(gradient_F)
    for parameter, weight, gradient in zip(layout.parameters, weights, gradients, strict=True):
        weight.copy_(parameter.detach())
        if has_master:
            parameter.register_post_accumulate_grad_hook(_adder(gradient))
        else:
            parameter.data, parameter.grad = weight, gradient
            gradient_views.append(gradient)
    return FlatGroup(
        layout,
        weight_decay,
        weights_F,
        gradient_F,
        new_moment(settings.states, layout.size, first.device, is_signed=True),
        new_moment(settings.states, layout.size, first.device, is_signed=False),
        has_master,
        gradient_views,
    )


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


def _seed_of_update(seed: int, num_updates: int) -> int:
    digest = hashlib.sha256(f"rounding:{seed}:{num_updates}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

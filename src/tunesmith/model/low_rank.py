"""Changes of frozen weights by low-rank products, and adapters that make up for them.

PiSSA and OLoRA take their first values out of the frozen weights, and an adapter may be merged
before another one is trained. What is trained then fits weights that no file has. The result is
written as one adapter for the weights as the files have them: of the trained product and the
changes, side by side. That is what PEFT's `path_initial_model_for_weight_conversion` writes, too.

Exact in the numbers that products are computed in. In bfloat16 the changed weights were rounded
once while training, which the result is not.

Shape letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.model.vocabulary import saves_rows_alone

PREFIX = "base_model.model."

OVERSAMPLED, POWER_STEPS = 16, 8
"""Of `truncated_svd`."""


@dataclass(frozen=True)
class LowRank:
    """`b_OR @ a_RI`, to be added to a weight; scale included."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


Changes = Mapping[str, tuple[LowRank, ...]]
"""By the name of the module in the base model."""


def changes_of(model: Any) -> Changes:
    """What the base weights of an adapted model are changed by, empty if by nothing."""
    return getattr(model, "base_changes", {})


def note_changes(model: Any, *changes: Changes) -> None:
    """Keeps with an adapted model what its base weights are changed by."""
    names = dict.fromkeys(name for each in changes for name in each)
    model.base_changes = {
        name: tuple(part for each in changes for part in each.get(name, ())) for name in names
    }


def truncated_svd(x_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first singular vectors and values `u [O, R], s [R], v [I, R]` of a matrix, nearly.

    By subspace iteration (arXiv 0909.4061, algorithm 4.4), from the same start every time and
    without a trace in torch's generators.
    """
    size = min(rank + OVERSAMPLED, *x_OI.shape)
    with torch.random.fork_rng(devices=[x_OI.device] if x_OI.is_cuda else []):
        torch.manual_seed(0)
        u_OR, s_R, v_IR = torch.svd_lowrank(x_OI.float(), size, niter=POWER_STEPS)
    return u_OR[:, :rank], s_R[:rank], v_IR[:, :rank]


def lora_products(model: Any, *, sign: float = 1.0) -> dict[str, tuple[LowRank, ...]]:
    """What the LoRA adapters of a model add to its weights, copied."""
    found: dict[str, tuple[LowRank, ...]] = {}
    for name, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        a_RI = module.lora_A["default"].weight.detach().float().cpu().clone()
        b_OR = module.lora_B["default"].weight.detach().float().cpu()
        scale = sign * float(module.scaling["default"])
        found[name.removeprefix(PREFIX)] = (LowRank(a_RI, b_OR * scale),)
    return found


def is_low_rank(config: Any) -> bool:
    """Whether all that an adapter changes is products on linear layers."""
    return (
        config.peft_type == "LORA"
        and not config.use_dora
        and not config.modules_to_save
        and config.bias == "none"
        and not config.trainable_token_indices
    )


def save_as_one(model: Any, folder: Path) -> None:
    """Writes the trained adapter and the changes of the base weights as one LoRA adapter."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    trained, changes = lora_products(model), changes_of(model)
    state = {
        name: tensor.detach().cpu().clone()  # a tied matrix has two names
        for name, tensor in get_peft_model_state_dict(model, **saves_rows_alone(model)).items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    ranks: dict[str, int] = {}
    for name in dict.fromkeys([*trained, *changes]):
        parts = [*trained.get(name, ()), *changes.get(name, ())]
        a_RI = torch.cat([part.a_RI for part in parts])
        state[f"{PREFIX}{name}.lora_A.weight"] = a_RI
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([part.b_OR for part in parts], 1)
        ranks[name] = len(a_RI)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _config_of(model.peft_config["default"], ranks).save_pretrained(str(folder))


def _config_of(config: Any, ranks: Mapping[str, int]) -> Any:
    """The configuration of an adapter with these ranks and a scale of 1."""
    config = copy.deepcopy(config)
    ((most, _),) = Counter(ranks.values()).most_common(1)
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config.r = config.lora_alpha = most
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.use_rslora, config.init_lora_weights = False, True
    config.target_modules, config.exclude_modules = sorted(ranks), None
    config.inference_mode = True
    return config

"""Writes golden.json: what TRL's own loss code gives on small fixed tensors.

    PATH/TO/PYTHON/WITH/TRL tests/parity/make_golden.py

Run with a Python that has TRL; nothing of ours is imported. TRL's losses are methods of its
trainers, so each is called on a stand-in that has the attributes it reads, and no model.
Gradients are those of the mean loss. PPO has left TRL: golden_ppo.py adds its values with an older
one, and this script keeps them.
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl

GOLDEN = Path(__file__).with_name("golden.json")
PAIRS = 6


def stand_in(**attributes: Any) -> SimpleNamespace:
    """A trainer without a model, on one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    common = {
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
    }
    return SimpleNamespace(**{**common, **attributes})


def leaf(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def pair_inputs() -> dict[str, list]:
    rng = random.Random(0)
    chosen = [rng.uniform(-30, -4) for _ in range(PAIRS)]
    rejected = [rng.uniform(-30, -4) for _ in range(PAIRS)]
    return {
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_ref": [x + rng.uniform(-4, 4) for x in chosen],
        "rejected_ref": [x + rng.uniform(-4, 4) for x in rejected],
        "chosen_tokens": [rng.randint(2, 9) for _ in range(PAIRS)],
        "rejected_tokens": [rng.randint(2, 9) for _ in range(PAIRS)],
    }


# TRL's sigmoid has lost its label smoothing; AOT, which is DPO on a single pair, still has it.
ONE_PAIR = {"cdpo"}

DPO_CASES = {
    "sigmoid": ("sigmoid", {"beta": 0.3}),
    "cdpo": ("aot", {"beta": 0.3, "label_smoothing": 0.1}),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 2.0}),
    "robust": ("robust", {"beta": 0.3, "label_smoothing": 0.2}),
    "hinge": ("hinge", {"beta": 0.3}),
    "ipo": ("ipo", {"beta": 0.3}),
    "exo": ("exo_pair", {"beta": 0.3, "label_smoothing": 0.01}),
    "nca": ("nca_pair", {"beta": 0.3}),
    "sppo": ("sppo_hard", {"beta": 0.3}),
    "apo_zero": ("apo_zero", {"beta": 0.3}),
    "apo_down": ("apo_down", {"beta": 0.3}),
    "rpo": ("sigmoid,sft", {"beta": 0.3, "sft_weight": 0.5}),
}


def dpo(inputs: dict[str, list]) -> list[dict[str, Any]]:
    return [dpo_case(name, *case, inputs) for name, case in DPO_CASES.items()]


def dpo_case(name: str, loss_type: str, settings: dict, inputs: dict) -> dict[str, Any]:
    if name in ONE_PAIR:
        inputs = {key: values[:1] for key, values in inputs.items()}
    chosen, rejected = leaf(inputs["chosen_logp"]), leaf(inputs["rejected_logp"])
    tokens = torch.tensor(inputs["chosen_tokens"] + inputs["rejected_tokens"])
    mask = (torch.arange(tokens.max()) < tokens[:, None]).long()
    logps = torch.cat([chosen, rejected])[:, None] * mask / tokens[:, None]
    outputs = SimpleNamespace(
        log_probs=logps, entropy=mask.double(), mean_logits=mask.double(), is_top1=mask.bool()
    )
    parts = loss_type.count(",") + 1
    first = torch.zeros(len(tokens), 1, dtype=torch.long)
    trainer = stand_in(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=loss_type.split(","),
        loss_weights=[1.0, settings.get("sft_weight", 0.0)][:parts],
        beta=settings["beta"], label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=False,
    )  # fmt: skip
    batch = {
        "input_ids": torch.cat([first, mask], dim=1),
        "attention_mask": torch.cat([first + 1, mask], dim=1),
        "completion_mask": torch.cat([first, mask], dim=1),
        "ref_chosen_logps": torch.tensor(inputs["chosen_ref"], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor(inputs["rejected_ref"], dtype=torch.float64),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    metrics = trainer._metrics["train"]
    return {
        "name": name,
        "settings": settings,
        "chosen_reward": metrics["rewards/chosen"][0],
        "rejected_reward": metrics["rewards/rejected"][0],
        **result(loss, chosen_logp=chosen, rejected_logp=rejected),
    }


def result(loss: torch.Tensor, **leaves: torch.Tensor) -> dict[str, Any]:
    """The loss, and its gradient in every leaf."""
    gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    return {
        "loss": loss.item(),
        "gradients": {name: g.tolist() for name, g in zip(leaves, gradients, strict=True)},
    }


def kto_inputs() -> dict[str, list]:
    rng = random.Random(1)
    logp = [rng.uniform(-30, -4) for _ in range(8)]
    mismatched = [rng.uniform(-40, -20) for _ in range(8)]
    return {
        "logp": logp,
        "ref": [x + rng.uniform(-4, 4) for x in logp],
        "is_good": [True, False, True, True, False, False, True, False],
        "mismatched_logp": mismatched,
        "mismatched_ref": [x + rng.uniform(-3, 1) for x in mismatched],
    }


KTO_CASES = {
    "kto": {"kind": "kto", "beta": 0.3},
    "kto_weights": {"kind": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "kto_kl_below_0": {"kind": "kto", "beta": 0.3},
    "apo_zero_unpaired": {"kind": "apo_zero_unpaired", "beta": 0.3},
}


def kto(inputs: dict[str, list]) -> list[dict[str, Any]]:
    return [kto_case(name, settings, inputs) for name, settings in KTO_CASES.items()]


def kto_case(name: str, settings: dict, inputs: dict) -> dict[str, Any]:
    logp = leaf(inputs["logp"])
    sign = -1 if name == "kto_kl_below_0" else 1
    kl_logps = sign * torch.tensor(inputs["mismatched_logp"], dtype=torch.float64)
    mask = torch.ones(len(logp), 1, dtype=torch.long)
    outputs = SimpleNamespace(log_probs=logp[:, None], entropy=mask, mean_logits=mask)
    trainer = stand_in(
        _compute_kl_logps=lambda model, batch: kl_logps, precompute_ref_logps=True,
        calculate_KL=settings["kind"] == "kto", loss_type=settings["kind"], beta=settings["beta"],
        desirable_weight=settings.get("desirable_weight", 1.0),
        undesirable_weight=settings.get("undesirable_weight", 1.0),
    )  # fmt: skip
    batch = {
        "label": torch.tensor(inputs["is_good"]),
        "input_ids": torch.ones(len(logp), 2, dtype=torch.long),
        "attention_mask": torch.ones(len(logp), 2),
        "completion_mask": torch.cat([0 * mask, mask], dim=1),
        "ref_logps": torch.tensor(inputs["ref"], dtype=torch.float64),
        "ref_KL_logps": sign * torch.tensor(inputs["mismatched_ref"], dtype=torch.float64),
    }
    loss = trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    kl = trainer._metrics["train"]["kl"][0]
    return {"name": name, "settings": settings, "kl": kl, **result(loss, logp=logp)}


def logit_inputs() -> dict[str, list]:
    """Two pairs of sequences of 6 tokens and 5 words; the prompt is 2 tokens, -100 is no target."""
    rng = random.Random(2)
    labels = [[-100, -100, 3, 1, 0, 2], [-100, -100, 4, 0, -100, -100]]
    labels += [[-100, -100, 1, 1, 2, -100], [-100, -100, 2, 4, 3, 0]]
    logits = [[[rng.gauss(0, 1.5) for _ in range(5)] for _ in range(6)] for _ in labels]
    return {"labels": labels, "logits": logits}


def reference_free(inputs: dict[str, list]) -> list[dict[str, Any]]:
    """SimPO, CPO and ORPO from logits to loss, their own token averages and all."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    cpo, simpo = (
        {"loss_type": "sigmoid", "cpo_alpha": 1.0},
        {"loss_type": "simpo", "cpo_alpha": 0.0},
    )
    common = {"alpha": 0.0, "simpo_gamma": 0.0, "label_smoothing": 0.0}
    orpo = {"name": "orpo", "settings": {"beta": 0.4}}
    cases = [
        {"name": "cpo", "settings": {"beta": 0.4}, **cpo},
        {"name": "cpo", "settings": {"beta": 0.4, "label_smoothing": 0.1}, **cpo},
        {"name": "cpo", "settings": {"beta": 0.4, "sft_weight": 0.0}, **cpo, "cpo_alpha": 0.0},
        {"name": "simpo", "settings": {"beta": 2.0, "margin": 1.0}, **simpo, "simpo_gamma": 1.0},
        {"name": "simpo", "settings": {"beta": 2.0, "margin": 1.0, "sft_weight": 0.5}, **simpo,
         "simpo_gamma": 1.0, "cpo_alpha": 0.5},
    ]  # fmt: skip
    made = [logits_case(CPOTrainer, {**common, **case}, inputs) for case in cases]
    return [*made, logits_case(ORPOTrainer, orpo, inputs)]


def logits_case(trainer_class: type, case: dict, inputs: dict) -> dict[str, Any]:
    name, settings = case.pop("name"), case.pop("settings")
    logits, labels = leaf(inputs["logits"]), torch.tensor(inputs["labels"])
    chosen, rejected = labels.chunk(2)
    trainer = stand_in(
        **case, beta=settings["beta"], is_encoder_decoder=False, pad_token_id=0, padding_value=0,
        get_batch_logps=trainer_class.get_batch_logps,
        concatenated_inputs=trainer_class.concatenated_inputs,
    )  # fmt: skip
    trainer.label_smoothing = settings.get("label_smoothing", 0.0)
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, method):
            setattr(trainer, method, getattr(trainer_class, method).__get__(trainer))
    # ORPO's NLL covers what is attended to, so the prompt is not: ours covers the answer alone.
    batch: dict[str, torch.Tensor] = {}
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        batch[f"{side}_labels"] = rows
        batch[f"{side}_input_ids"] = rows.clamp(min=0)
        batch[f"{side}_attention_mask"] = (rows != -100).long()
    loss, metrics = trainer_class.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch
    )
    rewards = {f"{side}_reward": metrics[f"rewards/{side}"] for side in ("chosen", "rejected")}
    return {"name": name, "settings": settings, **rewards, **result(loss, logits=logits)}


def reward_inputs() -> dict[str, list]:
    rng = random.Random(3)
    return {
        "chosen_score": [rng.gauss(1, 2) for _ in range(PAIRS)],
        "rejected_score": [rng.gauss(0, 2) for _ in range(PAIRS)],
        "margin": [rng.uniform(0, 1) for _ in range(PAIRS)],
    }


def reward(inputs: dict[str, list]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for name, center in (("plain", 0.0), ("margin", 0.0), ("centered", 0.01)):
        chosen, rejected = leaf(inputs["chosen_score"]), leaf(inputs["rejected_score"])
        scores = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=center or None))
        batch = {"attention_mask": torch.ones(2 * PAIRS, 1)}
        if name == "margin":
            batch["margin"] = torch.tensor(inputs["margin"], dtype=torch.float64)
        loss = trl.RewardTrainer.compute_loss(trainer, lambda scores=scores, **_: scores, batch)
        found = result(loss, chosen_score=chosen, rejected_score=rejected)
        made.append({"name": name, "settings": {"center": center}, **found})
    return made


def divergence_inputs() -> dict[str, list]:
    rng = random.Random(4)
    rows = [[[rng.gauss(0, 2) for _ in range(5)] for _ in range(4)] for _ in range(2)]
    return {"student": rows[0], "teacher": rows[1]}


def divergence(inputs: dict[str, list]) -> list[dict[str, Any]]:
    from trl.experimental.gkd import GKDTrainer

    made: list[dict[str, Any]] = []
    for kind, share in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5), ("jsd", 0.2)):
        for temperature in (1.0, 2.0):
            student = leaf([inputs["student"]])
            teacher = torch.tensor([inputs["teacher"]], dtype=torch.float64)
            loss = GKDTrainer.generalized_jsd_loss(
                student, teacher, beta=share, temperature=temperature, reduction="sum"
            )
            settings: dict[str, Any] = {"temperature": temperature}
            if kind == "jsd":
                settings["teacher_share"] = share
            made.append({"name": kind, "settings": settings, **result(loss, student=student)})
    return made


def main() -> None:
    from golden_policies import POLICIES  # beside this file: scripts find their folder first

    makers = {
        "pairs": (pair_inputs, dpo),
        "kto": (kto_inputs, kto),
        "reference_free": (logit_inputs, reference_free),
        "reward": (reward_inputs, reward),
        "divergence": (divergence_inputs, divergence),
        **POLICIES,
    }
    versions = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.is_file() else {}
    for name, (make_inputs, make_cases) in makers.items():
        inputs = make_inputs()
        golden[name] = {"versions": versions, "inputs": inputs, "cases": make_cases(inputs)}
    GOLDEN.write_text(as_lines(golden), "utf-8")


def as_lines(golden: dict[str, Any]) -> str:
    """JSON with one line for each case, so that a change shows where it is."""
    sections: list[str] = []
    for name, section in golden.items():
        head = {key: section[key] for key in ("versions", "inputs")}
        lines = ",\n  ".join(map(json.dumps, section["cases"]))
        cases = f'"cases": [\n  {lines}\n ]'
        sections.append(f"{json.dumps(name)}: {json.dumps(head)[:-1]}, {cases}}}")
    return "{" + ",\n".join(sections) + "}\n"


if __name__ == "__main__":
    main()

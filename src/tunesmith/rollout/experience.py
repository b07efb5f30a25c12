"""What one sampling leaves to learn from, and its file in a checkpoint.

Shape letters: P prompts, K answers of each, A answers (P * K), T tokens of all answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.types import Json

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Experience:
    """The answers to one batch of prompts.

    Args:
        number: of the sampling, from 0.
        sample_ids: of the prompts' samples.
        prompts: token ids, P of them.
        answers: token ids, A of them, those to a prompt one after another.
        is_complete_A: whether an answer ended by itself.
        reward_A: what it was judged to be worth; NaN where nobody could.
        columns_T: what is known of each token of all answers, by name; see objectives/policy.py.
        facts: what the run says about it.
        kl_weight: of the divergence in the rewards, which may have been adapted.
    """

    number: int
    sample_ids: tuple[int, ...]
    prompts: tuple[Ids, ...]
    answers: tuple[Ids, ...]
    is_complete_A: torch.Tensor
    reward_A: torch.Tensor
    columns_T: Mapping[str, torch.Tensor]
    facts: Mapping[str, Json] = field(default_factory=dict[str, Json])
    kl_weight: float = 0.0

    @property
    def num_answers(self) -> int:
        """To each prompt (K)."""
        return len(self.answers) // len(self.prompts)

    @property
    def reward_PK(self) -> torch.Tensor:
        """Rewards by prompt."""
        return self.reward_A.view(len(self.prompts), -1)

    @property
    def ends(self) -> list[int]:
        """Where each answer begins in `columns_T`, and the end of the last one."""
        return [0, *accumulate(map(len, self.answers))]

    def rows(self, answers: Sequence[int]) -> torch.Tensor:
        """The places of some answers' tokens in `columns_T`, one answer after another."""
        ends = self.ends
        return torch.cat([torch.arange(ends[a], ends[a + 1]) for a in answers])

    @property
    def answer_T(self) -> torch.Tensor:
        """The number of each token's answer."""
        lengths = torch.tensor([len(ids) for ids in self.answers])
        return torch.arange(len(self.answers)).repeat_interleave(lengths)

    def only(self, samples: Collection[int]) -> Experience:
        """The part of it that answers the prompts of some samples."""
        kept = [number for number, sample in enumerate(self.sample_ids) if sample in samples]
        each = self.num_answers
        answers = [answer for n in kept for answer in range(n * each, (n + 1) * each)]
        places_T = self.rows(answers)
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[number] for number in kept),
            prompts=tuple(self.prompts[number] for number in kept),
            answers=tuple(self.answers[answer] for answer in answers),
            is_complete_A=self.is_complete_A[answers],
            reward_A=self.reward_A[answers],
            columns_T={name: column[places_T] for name, column in self.columns_T.items()},
        )

    def save(self, file: Path) -> None:
        """Writes it as safetensors."""
        tensors = {f"column.{name}": column for name, column in self.columns_T.items()}
        tensors |= {"is_complete": self.is_complete_A, "reward": self.reward_A}
        for name, ids in (("prompts", self.prompts), ("answers", self.answers)):
            tensors[f"{name}.ids"] = torch.tensor([i for each in ids for i in each])
            tensors[f"{name}.lengths"] = torch.tensor([len(each) for each in ids])
        about = {
            "number": self.number,
            "sample_ids": self.sample_ids,
            # The clock is no part of what a resumed run does again, bit by bit.
            "facts": {n: fact for n, fact in self.facts.items() if n != "sampling_seconds"},
            "kl_weight": self.kl_weight,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, file: Path) -> Experience:
        """Reads what `save` wrote."""
        with safe_open(file, framework="pt") as stored:
            about = json.loads(stored.metadata()["about"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        prefix = "column."
        columns = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return cls(
            number=about["number"],
            sample_ids=tuple(about["sample_ids"]),
            prompts=_split(tensors, "prompts"),
            answers=_split(tensors, "answers"),
            is_complete_A=tensors["is_complete"],
            reward_A=tensors["reward"],
            columns_T=columns,
            facts=about["facts"],
            kl_weight=about["kl_weight"],
        )


def _split(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[Ids, ...]:
    ids: list[int] = tensors[f"{name}.ids"].tolist()
    ends = [0, *accumulate(tensors[f"{name}.lengths"].tolist())]
    return tuple(tuple(ids[start:end]) for start, end in pairwise(ends))

"""Answers for every step: sampled, judged, and kept as long as updates learn from them.

Shape letters: P prompts, K answers of each, A answers, T tokens of all answers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunesmith.config.policy import GroupConfig, PpoConfig
from tunesmith.data.loader import Loader
from tunesmith.data.order import order, stream_seed
from tunesmith.engine.oom import TooLargeError, smaller_budget
from tunesmith.errors import OutOfMemoryError, RewardError
from tunesmith.infer.sample import Drawing, Drawn
from tunesmith.io.atomic import write_atomic
from tunesmith.io.redact import redact
from tunesmith.objectives.policy import PolicyObjective
from tunesmith.objectives.policy_losses import informative_groups
from tunesmith.rollout.batches import Packing
from tunesmith.rollout.experience import Experience
from tunesmith.rollout.judge import Judge, Judged
from tunesmith.rollout.learn import following_kl_weight, lesson_of
from tunesmith.rollout.prompts import Prompt, prompts_of
from tunesmith.rollout.sampler import Engine, IsStopped, uniform_numbers
from tunesmith.types import GlobalBatch, Json, PackedBatch

SAMPLING_STREAM, UPDATE_STREAM = 2, 3
"""Streams of random numbers beside that of the order of samples."""

SHOWN_PROMPTS = 4
"""Of each step: their answers are written down for people to read."""

FOLDER, EXPERIENCE, VALUE_HEAD = "rollout", "experience.safetensors", "value_head.safetensors"
"""In a checkpoint."""

Look = Callable[[PackedBatch], dict[str, torch.Tensor]]


@dataclass
class Rollouts:
    """Where a run's answers come from; only `current` is kept in checkpoints.

    What memory has taught (`most_tokens`, the engine's answers at once) ends with the process: a
    run that went short of memory and is resumed may round otherwise than one that never stopped.

    Args:
        model: that answers and learns.
        objective: that looks at answers before they are learned from.
        config: of the recipe, resolved.
        engine: that samples.
        judge: that rewards.
        drawing: how answers are drawn.
        packing: how they are laid into batches.
        loader: of prompts to train on.
        validation: of prompts that are held out; None if there are none.
        folder: where some answers are written down.
        look: runs the objective's `look` on a micro-batch.
        too_large: makes the error of a micro-batch that cannot be cut any more.
        current: what is being learned from.
        most_tokens: of a micro-batch that is looked at, once memory has ended there.
    """

    model: Any
    objective: PolicyObjective
    config: GroupConfig | PpoConfig
    engine: Engine
    judge: Judge
    drawing: Drawing
    packing: Packing
    loader: Loader
    validation: Loader | None
    folder: Path
    look: Look
    too_large: Callable[[TooLargeError], OutOfMemoryError]
    current: Experience | None = None
    most_tokens: int | None = None

    # Training

    def batch(
        self, given: GlobalBatch, step: int, budget: int, is_stopped: IsStopped
    ) -> GlobalBatch | None:
        """What a step learns from: answers to the prompts of its batch; None if it was stopped.

        Args:
            given: the samples whose prompts are answered.
            step: from 0.
            budget: tokens of a micro-batch.
            is_stopped: asked before each token.

        Raises:
            OutOfMemoryError: one answer alone is too much.
        """
        if not given.sample_ids:  # all of them are left out
            return given
        number = step // self.config.steps_per_sampling
        found = self._known(number, given.sample_ids)
        if found is None:
            found = self._sampled(given.sample_ids, number, budget, is_stopped)
        if found is None:
            return None
        self.current = found
        return self.packed(step, budget, given.epoch)

    def packed(self, step: int, budget: int, epoch: int = 0) -> GlobalBatch:
        """The part of the current answers that a step learns from."""
        experience = self.current
        if experience is None:
            raise ValueError("nothing is sampled yet")
        updates, part = divmod(step, self.config.mini_batches)
        prompts = order(stream_seed(self.loader.seed, UPDATE_STREAM), updates, self._num_prompts)
        chosen = prompts[part :: self.config.mini_batches].tolist()
        if isinstance(self.config, GroupConfig) and self.config.drop_equal is True:
            teaches = informative_groups(experience.reward_PK)
            chosen = [prompt for prompt in chosen if teaches[prompt]]
        each = experience.num_answers
        answers = [a for prompt in chosen for a in range(prompt * each, (prompt + 1) * each)]
        return self.packing.batch(experience, answers, budget, epoch=epoch)

    def _known(self, number: int, samples: tuple[int, ...]) -> Experience | None:
        """The answers of a sampling as they are known already; None if these are to be sampled."""
        known, wanted = self.current, frozenset(samples)
        if known is None or known.number != number:
            return None
        # A rollback leaves samples out; when the data was changed, numbers mean other samples.
        if tuple(sample for sample in known.sample_ids if sample in wanted) != samples:
            return None
        return known if known.sample_ids == samples else known.only(wanted)

    @property
    def _num_prompts(self) -> int:
        return 0 if self.current is None else len(self.current.prompts)

    def _sampled(
        self, samples: Sequence[int], number: int, budget: int, is_stopped: IsStopped
    ) -> Experience | None:
        started = time.perf_counter()
        prompts = prompts_of(self.loader, samples, self.judge.tokenizer)
        num_answers = self.config.answers if isinstance(self.config, GroupConfig) else 1
        seed = stream_seed(self.loader.seed, SAMPLING_STREAM)
        shape = (len(prompts), num_answers, self.drawing.max_tokens)
        answers = self.engine.sample(
            [prompt.ids for prompt in prompts],
            uniform_numbers(seed, number, shape),
            self.drawing,
            is_stopped,
        )
        if answers is None:
            return None
        seconds = time.perf_counter() - started
        judged = self.judge(prompts, answers)
        if number == 0 and bool(judged.reward_A.isnan().all()):
            raise RewardError(
                "reward.nothing",
                str(self.loader.origins(samples[:1])[0]),
                found=f"no reward for any of {len(judged.texts)} answers",
                expected="at least one that can be judged",
                try_="a reference in the rows (docs/data.md, prompt), or another reward function",
            )
        experience = self._experience(number, prompts, answers, judged)
        if self._looks:
            experience = self._looked_at(experience, budget)
        lesson = lesson_of(experience, self.config)
        facts: dict[str, Json] = {
            **_facts(answers, judged, self.drawing),
            **({} if lesson.kl is None else {"kl_of_answers": lesson.kl}),
            "sampling_seconds": round(seconds, 2),
        }
        if isinstance(self.config, GroupConfig):
            teaches_P = informative_groups(experience.reward_PK)
            facts["equal_groups"] = round(1 - float(teaches_P.float().mean()), 4)
        elif self.config.kl_target is not None:
            facts["kl_weight"] = experience.kl_weight
        self._write_down(f"step-{self._first_step(number):08d}", prompts, judged)
        columns = {**experience.columns_T, **lesson.columns_T}
        return replace(experience, columns_T=columns, facts=facts)

    @property
    def _looks(self) -> bool:
        """Whether log-probabilities must be known before the first update."""
        adds_kl = bool(self.config.kl_weight) and self.config.name == "rloo"
        return self.config.steps_per_sampling > 1 or self.config.name == "ppo" or adds_kl

    def _first_step(self, number: int) -> int:
        return number * self.config.steps_per_sampling + 1

    def _experience(
        self,
        number: int,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Drawn]],
        judged: Judged,
    ) -> Experience:
        flat = [drawn for own in answers for drawn in own]
        kl_weight = float(self.config.kl_weight)
        if self.current is not None:
            kl_weight = following_kl_weight(self.current, self.config)
        return Experience(
            number=number,
            sample_ids=tuple(prompt.sample for prompt in prompts),
            prompts=tuple(prompt.ids for prompt in prompts),
            answers=tuple(drawn.ids for drawn in flat),
            is_complete_A=torch.tensor([drawn.is_complete for drawn in flat]),
            reward_A=judged.reward_A,
            columns_T={"engine_logp": torch.tensor([x for drawn in flat for x in drawn.logp])},
            kl_weight=kl_weight,
        )

    def _looked_at(self, experience: Experience, budget: int) -> Experience:
        """The experience with what the objective sees before any update."""
        num_tokens = experience.ends[-1]
        numbered = replace(experience, columns_T={"place": torch.arange(num_tokens)})
        every = range(len(experience.answers))
        self.model.eval()
        budget = min(budget, self.most_tokens or budget)
        while True:
            found: dict[str, torch.Tensor] = {}
            try:
                for batch in self.packing.micro_batches(numbered, every, budget):
                    for name, column_N in self.look(batch).items():
                        column_T = found.setdefault(name, torch.zeros(num_tokens))
                        column_T[batch.columns_N["place"]] = column_N.float().cpu()
                return replace(experience, columns_T={**experience.columns_T, **found})
            except TooLargeError as problem:
                pack = partial(self.packing.batch, numbered, every, epoch=0)
                smaller = smaller_budget(pack, problem.batch.num_stored_tokens)
                if smaller is None:
                    raise self.too_large(problem) from None
                budget = self.most_tokens = smaller

    # Validation

    def measure(self, step: int, is_stopped: IsStopped) -> dict[str, float] | None:
        """The mean reward of the likeliest answers to held-out prompts; `loss` is its negative.

        None if it was stopped, or nothing is held out.
        """
        if self.validation is None:
            return None
        samples = self.validation.samples[: self.config.validation_prompts].tolist()
        prompts = prompts_of(self.validation, samples, self.judge.tokenizer)
        drawing = replace(self.drawing, temperature=0.0)
        shape = (len(prompts), 1, drawing.max_tokens)
        answers = self.engine.sample(
            [prompt.ids for prompt in prompts], torch.zeros(shape), drawing, is_stopped
        )
        if answers is None:
            return None
        judged = self.judge(prompts, answers)
        self._write_down(f"validation-{step:08d}", prompts, judged)
        facts = _facts(answers, judged, drawing)
        facts.pop("reward_std")
        return {"loss": -facts["reward"], **facts}

    def _write_down(self, name: str, prompts: Sequence[Prompt], judged: Judged) -> None:
        each = len(judged.texts) // len(prompts)
        rows = [
            {
                "prompt": prompts[number // each].text,
                "reference": prompts[number // each].reference,
                "answer": judged.texts[number],
                "reward": _number(judged.reward_A[number]),
                **{f"reward_{n}": _number(c[number]) for n, c in judged.columns.items()},
            }
            for number in range(min(SHOWN_PROMPTS, len(prompts)) * each)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.folder / f"{name}.jsonl", redact(lines))

    # Checkpoints: see engine.checkpoint.Weights

    @property
    def num_bytes(self) -> int:
        """Of what a checkpoint holds besides weights."""
        head = self.objective.value_head
        own = 0 if head is None else sum(p.nbytes for p in head.parameters())
        kept = self.current.columns_T.values() if self.current is not None else ()
        return own + sum(column.nbytes for column in kept)

    def writer(self, *, copies: bool) -> Callable[[Path], None]:
        """What writes the current answers and the value head into a folder."""
        head = self.objective.value_head
        tensors = {} if head is None else {n: p.detach() for n, p in head.named_parameters()}
        if copies:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        kept = self.current if self.config.steps_per_sampling > 1 or tensors else None
        return partial(_write, kept, tensors)

    def load(self, folder: Path) -> None:
        """Reads what `writer` wrote."""
        file = folder / FOLDER / EXPERIENCE
        self.current = Experience.load(file) if file.exists() else None
        head = self.objective.value_head
        if head is not None:
            stored = load_file(folder / FOLDER / VALUE_HEAD)
            with torch.no_grad():
                for name, parameter in head.named_parameters():
                    parameter.copy_(stored[name])


def _write(experience: Experience | None, head: dict[str, torch.Tensor], folder: Path) -> None:
    place = folder / FOLDER
    if experience is not None:
        experience.save(place / EXPERIENCE)
    if head:
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in head.items()}, place / VALUE_HEAD)


def _facts(
    answers: Sequence[Sequence[Drawn]], judged: Judged, drawing: Drawing
) -> dict[str, float]:
    """What is worth knowing of answers; those that nobody could judge count nowhere.

    `entropy`, in nats a token, is estimated from the tokens drawn, where all could be.
    """
    flat = [drawn for own in answers for drawn in own]
    num_tokens = sum(len(drawn.ids) for drawn in flat)
    known = judged.reward_A[~judged.reward_A.isnan()]
    facts = {
        "reward": float(known.mean()) if len(known) else math.nan,
        "reward_std": float(known.std(correction=0)) if len(known) else math.nan,
    }
    if len(judged.columns) > 1:
        facts |= {f"reward_{n}": float(column.nanmean()) for n, column in judged.columns.items()}
    facts["answer_tokens"] = num_tokens / len(flat)
    facts["complete"] = sum(drawn.is_complete for drawn in flat) / len(flat)
    if drawing.temperature > 0 and drawing.top_p == 1 and drawing.top_k is None:
        facts["entropy"] = -sum(sum(drawn.logp) for drawn in flat) / num_tokens
    return facts


def _number(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(float(value), 6)

"""Goes over samples and their tokens, and puts the report together."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tunesmith.data.build import LARGE_BYTES, SPOKEN, read_sources
from tunesmith.data.check.columns_guess import looks_swapped
from tunesmith.data.check.labels import common_affixes, label_imbalance, task_kind
from tunesmith.data.check.language import detect_language
from tunesmith.data.check.lengths import Limit, Overlong, fate_of, num_pieces
from tunesmith.data.check.near_duplicates import NearDuplicates
from tunesmith.data.check.report import CheckReport, SourceReport, counted
from tunesmith.data.check.texts import Texts, look_at, texts_of
from tunesmith.data.encode import Pipeline
from tunesmith.data.sources import Sources
from tunesmith.data.store import kind_of
from tunesmith.data.templates import Renderer
from tunesmith.data.templates.skeleton import SkeletonMismatchError
from tunesmith.data.tokenize import TokenSequence
from tunesmith.errors import Problem
from tunesmith.types import (
    Completion,
    Conversation,
    Labeled,
    Origin,
    Rated,
    Reporter,
    Sample,
    Text,
)

MAX_PAIRS = 20_000
"""So many prompts and answers are kept to look at columns, labels and common endings."""

KEPT_CHARACTERS = 1_000
"""Of a kept text so many at either end."""

LANGUAGE_CHARACTERS = 1_000
"""So much of a sample tells its language."""

FEW_ROWS = 50
IMBALANCE = 10
"""A label with so many times the rows of another one is worth saying."""

MIN_AFFIX = 3
"""Shorter beginnings and ends that all texts share, such as a full stop, are not worth saying."""


@dataclass
class Dropped:
    """Rows that a cleaned copy leaves out, by their place."""

    rows: dict[Origin, Problem] = field(default_factory=dict[Origin, Problem])


def check_sources(
    sources: Sources,
    renderer: Renderer,
    reporter: Reporter,
    *,
    max_length: int | None,
    overlong: Overlong = "auto",
    is_auto: bool = False,
    kinds: Sequence[str] = (),
) -> tuple[CheckReport, Dropped]:
    """Checks all samples of training and validation data.

    Args:
        sources: what to read.
        renderer: of the template and tokenizer that training would use.
        reporter: shows a bar.
        max_length: tokens that a sample may have; None asks nothing of lengths.
        overlong: what the recipe does to longer ones.
        is_auto: the recipe leaves the length open; `max_length` is then the model's context.
        kinds: samples that the recipe's objective can learn from; empty takes all.

    Raises:
        DataError: a file as a whole cannot be read.
    """
    limit = Limit(max_length, overlong, is_auto)
    try:
        return _check(sources, renderer, reporter, limit, kinds)
    except SkeletonMismatchError:
        renderer.skeletons = None
        renderer.notes.clear()
        return _check(sources, renderer, reporter, limit, kinds)


def _check(
    sources: Sources, renderer: Renderer, reporter: Reporter, limit: Limit, kinds: Sequence[str]
) -> tuple[CheckReport, Dropped]:
    every = (*sources.stored, *sources.validation)
    checker = Checker(renderer, num_training=len(sources.stored), limit=limit, kinds=kinds)
    for number, source in enumerate(every):
        is_held_out = number >= len(sources.stored)
        entry = SourceReport(source.config.label, len(source.files), is_held_out)
        checker.report.sources.append(entry)
    num_bytes = sum(source.num_bytes for source in every)
    pipeline = Pipeline(renderer, is_large=num_bytes > LARGE_BYTES)
    for batch in pipeline.run(read_sources(every, reporter, "Checking")):
        for source, sample, tokens in batch:
            if isinstance(sample, Problem):
                checker.add_problem(source, sample)
            elif isinstance(tokens, Problem):
                checker.add_problem(source, tokens, sample.origin)
            else:
                checker.add(source, sample, tokens)
        checker.report.notes += batch.notes
    with reporter.waiting("Looking for near duplicates"):
        checker.finish()
    return checker.report, checker.dropped


class _Places:
    """Where every sample came from, in 12 bytes each."""

    def __init__(self) -> None:
        self.lines, self.files = array("q"), array("i")
        self.known: dict[tuple[str, str | None], int] = {}
        self.names: list[tuple[str, str | None]] = []

    def add(self, origin: Origin) -> None:
        name = (origin.path, origin.sheet)
        number = self.known.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        self.lines.append(origin.line)
        self.files.append(number)

    def __getitem__(self, index: int) -> Origin:
        path, sheet = self.names[self.files[index]]
        return Origin(path, self.lines[index], sheet)


class _Pairs:
    """Prompts and answers of evenly spread samples, at most MAX_PAIRS."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, bool]] = []
        self.step = 1
        self.num_seen = 0

    def add(self, prompt: str, answer: str, *, is_completion: bool) -> None:
        if self.num_seen % self.step == 0:
            self.kept.append((_clip(prompt), _clip(answer), is_completion))
            if len(self.kept) == MAX_PAIRS:
                self.kept = self.kept[::2]
                self.step *= 2
        self.num_seen += 1


def _clip(text: str) -> str:
    """Both ends of a long text."""
    if len(text) <= 2 * KEPT_CHARACTERS:
        return text
    return text[:KEPT_CHARACTERS] + text[-KEPT_CHARACTERS:]


class Checker:
    """Takes samples one by one; of their texts it keeps hashes, and the ends of some."""

    def __init__(
        self, renderer: Renderer, *, num_training: int, limit: Limit, kinds: Sequence[str] = ()
    ) -> None:
        self.report = CheckReport(template="", tokenizer="", max_length=limit.tokens)
        self.dropped = Dropped()
        self.specials = renderer.specials
        tokens = [renderer.tokenizer.eos_token, *renderer.traits.end_marks]
        self.ends = set(renderer.tokenizer.convert_tokens_to_ids([str(t) for t in tokens]))
        self.num_training = num_training
        self.limit, self.kinds = limit, kinds
        self.duplicates = NearDuplicates()
        self.places, self.pairs = _Places(), _Pairs()
        self.source_of = array("h")
        self.texts = array("q")
        self.longest_answer = 0
        self.lengths, self.supervised = array("q"), array("q")

    def add_problem(self, source: int, problem: Problem, origin: Origin | None = None) -> None:
        """Takes a row that cannot be used."""
        self.report.sources[source].unusable += 1
        self.report.findings.add(problem)
        if origin is not None:
            self.dropped.rows[origin] = problem

    def add(self, source: int, sample: Sample, sequences: Sequence[TokenSequence]) -> None:
        """Takes one sample with its tokens."""
        report, origin = self.report, sample.origin
        if self.kinds and kind_of(sample) not in self.kinds:
            found = SPOKEN[kind_of(sample)]
            wanted = " or ".join(SPOKEN[kind] for kind in self.kinds)
            problem = Problem(str(origin), "data.kind", found, f"{wanted}, for this objective")
            self.add_problem(source, problem, origin)
            return
        report.sources[source].samples += 1
        report.kinds[kind_of(sample)] += 1
        texts = texts_of(sample)
        for problem in look_at(sample, texts, self.specials):
            report.findings.add(problem)
        self._count(sample, texts)
        self._measure(source, sample, sequences)
        self.duplicates.add(texts.whole)
        self.places.add(origin)
        self.source_of.append(source)

    def _count(self, sample: Sample, texts: Texts) -> None:
        report = self.report
        report.languages[
            detect_language(texts.spoken[:LANGUAGE_CHARACTERS]) or "too short to tell"
        ] += 1
        inner = sample.conversation if isinstance(sample, Rated) else sample
        inner = inner.content if isinstance(inner, Labeled) else inner
        if isinstance(inner, Conversation):
            roles = Counter[str](message.role for message in inner.messages)
            report.roles += roles
            report.turns[roles["assistant"]] += 1
            report.messages[len(inner.messages)] += 1
            report.without.update(role for role in ("system", "user") if not roles[role])
        if texts.answers:
            is_completion = isinstance(sample, Completion)
            self.pairs.add(texts.prompt, texts.answers[-1], is_completion=is_completion)

    def _measure(self, source: int, sample: Sample, sequences: Sequence[TokenSequence]) -> None:
        tokens = sum(len(sequence.ids) for sequence in sequences)
        learned = sum(length for sequence in sequences for _, length, _ in sequence.runs)
        self.lengths.append(tokens)
        self.supervised.append(learned)
        where, findings = str(sample.origin), self.report.findings
        if learned == 0:
            problem = Problem(
                where, "data.nothing-to-learn", "no token that carries loss", "at least one"
            )
            findings.add(problem)
            self.dropped.rows[sample.origin] = problem
            return
        if isinstance(sample, Text):
            # How long raw text may be is known when all of it was seen.
            self.texts.append(len(self.lengths) - 1)
        else:
            tokens = self._fit(where, sequences, tokens)
        if source < self.num_training:
            self.report.training_samples += 1
            self.report.training_tokens += tokens
        if isinstance(sample, Labeled):
            return  # nothing in it is to be written, nor ended
        if any(int(sequence.ids[-1]) not in self.ends for sequence in sequences):
            found = "an answer whose last token is no end token"
            findings.add(Problem(where, "data.no-end", found, "an end token"))

    def _fit(self, where: str, sequences: Sequence[TokenSequence], tokens: int) -> int:
        """Says what becomes of an overlong sample; returns its tokens that are used."""
        longest, most = max(len(sequence.ids) for sequence in sequences), self.limit.tokens
        self.longest_answer = max(self.longest_answer, longest)
        if most is None or longest <= most:
            return tokens
        fate = fate_of(sequences, most, self.limit.overlong)
        self._say_overlong(where, longest, most, fate.text)
        return fate.used_tokens

    def _say_overlong(self, where: str, length: int, most: int, fate: str) -> None:
        found, expected = f"{length:,} tokens: {fate}", f"at most {most:,}"
        self.report.findings.add(Problem(where, "data.overlong", found, expected))

    def finish(self) -> None:
        """Looks at all samples together."""
        report = self.report
        lengths = np.asarray(self.lengths, dtype=np.int64)
        self._fit_texts(lengths)
        # A sample of which nothing is learned has no tokens.
        report.lengths = lengths[lengths > 0]
        report.supervised = np.asarray(self.supervised, dtype=np.int64)[lengths > 0]
        self._find_copies()
        self._look_at_columns()
        num_answered = report.num_samples - report.kinds["Text"]
        if 0 < num_answered < FEW_ROWS:
            found = counted(num_answered, "sample")
            self._say("data.few-rows", found, f"at least {FEW_ROWS}")

    def _fit_texts(self, lengths: npt.NDArray[np.int64]) -> None:
        """Says what becomes of overlong raw texts."""
        lengths = lengths[np.asarray(self.texts, dtype=np.int64)]
        longest = int(lengths.max(initial=0))
        most = self.limit.for_text(self.longest_answer, longest)
        if most is None or longest <= most:
            return
        is_overlong, overlong = lengths > most, self.limit.overlong
        if overlong in ("auto", "split"):
            pieces = sum(num_pieces(length, most) for length in lengths[is_overlong].tolist())
            texts = counted(int(is_overlong.sum()), "raw text")
            self.report.facts.append(
                f"{texts} longer than {most:,} tokens: cut into {pieces:,} pieces"
            )
            return
        fate = {"drop": "left out", "cut_left": "its start is cut off"}
        for place in np.flatnonzero(is_overlong).tolist():
            index, length = self.texts[place], int(lengths[place])
            if self._trains(index):
                self.report.training_tokens -= length if overlong == "drop" else length - most
            where, what = str(self.places[index]), fate.get(overlong, "its end is cut off")
            self._say_overlong(where, length, most, what)

    def _find_copies(self) -> None:
        for group in self.duplicates.exact_groups():
            training = [index for index in group if self._trains(index)]
            held_out = [index for index in group if not self._trains(index)]
            # Of a training row and a validation row, the training row goes.
            if training and held_out:
                self._drop_copy("data.leak", training[0], held_out[0])
            for kept, *others in filter(None, (training, held_out)):
                for index in others:
                    self._drop_copy("data.duplicate", index, kept)
        for group in self.duplicates.groups():
            first, *others = group
            for index in others:
                is_leak = self._trains(first) != self._trains(index)
                code = "data.near-leak" if is_leak else "data.near-duplicate"
                found = f"nearly the same as {self._place_from(index, first)}"
                problem = Problem(str(self.places[index]), code, found, "rows that differ")
                self.report.findings.add(problem)

    def _drop_copy(self, code: str, copy: int, kept: int) -> None:
        expected = "other rows than in validation" if code == "data.leak" else "each row once"
        found = f"the same as {self._place_from(copy, kept)}"
        problem = Problem(str(self.places[copy]), code, found, expected)
        self.report.findings.add(problem)
        self.dropped.rows[self.places[copy]] = problem

    def _place_from(self, here: int, there: int) -> str:
        """A row as seen from another one."""
        one, other = self.places[here], self.places[there]
        is_near = (one.path, one.sheet) == (other.path, other.sheet)
        if not is_near:
            return str(other)
        return f"row {other.line}" if other.sheet else f"line {other.line}"

    def _trains(self, index: int) -> bool:
        return self.source_of[index] < self.num_training

    def _look_at_columns(self) -> None:
        kept = self.pairs.kept
        if not kept:
            return
        prompts, answers = [prompt for prompt, _, _ in kept], [answer for _, answer, _ in kept]
        reason = looks_swapped(list(zip(prompts, answers, strict=True)))
        if reason:
            self._say("data.swapped", reason, "prompts that ask, answers that answer")
        if len(kept) > 2 and len(set(prompts)) == 1 and prompts[0].strip():
            found = f"one prompt for all rows: {prompts[0][:40]!r}"
            self._say("data.same-prompt", found, "prompts that differ")
        if len(kept) > 2 and len(set(answers)) == 1:
            found = f"one answer to all rows: {answers[0][:40]!r}"
            self._say("data.same-answer", found, "answers that differ")
        self._look_at_labels(answers)
        completions = [(prompt, answer) for prompt, answer, is_completion in kept if is_completion]
        if completions:
            self._describe_completions(*map(list, zip(*completions, strict=True)))

    def _look_at_labels(self, answers: list[str]) -> None:
        labels = label_imbalance(answers)
        if labels is None or len(labels.counts) < 2:
            return
        shown = ", ".join(f"{name!r} {n:,}" for name, n in list(labels.counts.items())[:8])
        more = f" and {len(labels.counts) - 8:,} more" if len(labels.counts) > 8 else ""
        part = f" (of {len(answers):,} rows looked at)" if self.pairs.step > 1 else ""
        self.report.facts.append(f"looks like classification: {shown}{more}{part}")
        found = [f"{shown}{more}"]
        if labels.variants:
            spellings = " or ".join(map(repr, labels.variants[0]))
            found.append(f"one label spelled {spellings}")
        if (
            labels.variants
            or min(labels.counts.values()) * IMBALANCE < labels.counts[labels.largest_label]
        ):
            expected = "labels of similar number, each spelled in one way"
            self._say("data.label-imbalance", "; ".join(found), expected)

    def _describe_completions(self, prompts: list[str], answers: list[str]) -> None:
        """What OpenAI's old prepare_data asked about, as facts: templates mark where texts end."""
        if task_kind(prompts, answers) == "open_ended":
            self.report.facts.append("no prompt has text: raw text (`text`) says the same")
        for name, texts in (("prompts", prompts), ("completions", answers)):
            affixes = common_affixes(texts)
            if len(affixes.prefix) >= MIN_AFFIX:
                self.report.facts.append(f"all {name} start with {affixes.prefix[:60]!r}")
            if len(affixes.suffix) >= MIN_AFFIX:
                self.report.facts.append(f"all {name} end in {affixes.suffix[-60:]!r}")

    def _say(self, code: str, found: str, expected: str) -> None:
        where = ", ".join(source.name for source in self.report.sources[:3])
        self.report.findings.add(Problem(where, code, found, expected))


def look_at_start(rows: Sequence[Sample | Problem], specials: frozenset[str]) -> CheckReport:
    """The checks of single texts on some rows, for the start of a training."""
    report = CheckReport(template="", tokenizer="")
    for sample in rows:
        if not isinstance(sample, Problem):
            report.kinds[kind_of(sample)] += 1
            for problem in look_at(sample, texts_of(sample), specials):
                report.findings.add(problem)
    return report

"""`reference: cached`: what the model says of every answer before training, computed once.

A pair is never cut, so a sequence's log-probability depends on nothing but its tokens and the model
as it begins. It is kept under the cache's folder by a hash of all that decides it, in parts, so
that a pass that is cut off goes on. A step then has one forward less, and no copy of the weights.

Packs differ between the pass and a step, and with them the rounding: the first loss of dpo is ln 2
within it, not exactly.

Shape letters: S sequences of a batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.config.recipe import Recipe
from tunesmith.data.loader import Loader
from tunesmith.engine.oom import SMALLEST_TOKENS, free_memory
from tunesmith.engine.step import Run
from tunesmith.errors import LockError, OutOfMemoryError
from tunesmith.io.atomic import atomic_directory, sweep_temporaries, write_atomic
from tunesmith.io.cache import cache_folder
from tunesmith.io.lock import directory_lock
from tunesmith.io.manifest import find_damage, write_manifest
from tunesmith.job import Job
from tunesmith.model.reference import begins_as_nothing
from tunesmith.objectives.lm import sequence_logp
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import PackedBatch, Reporter

PASS_VERSION = 1
"""Goes up when the same model and tokens give other numbers, or the files change."""

PART_SAMPLES = 64
"""Samples that are written together: enough to fill packs, few enough to lose in a kill."""

LABEL = "Log-probabilities before training"

Values = npt.NDArray[np.float32]


def with_reference(run: Run, job: Job, reporter: Reporter) -> tuple[Run, list[str]]:
    """The run with what its model says before training, if the recipe asks for it in advance.

    Args:
        run: with the model as it begins.
        job: what is known of the run.
        reporter: shows the pass.

    Returns:
        the run, and lines that say where the numbers come from.

    Raises:
        OutOfMemoryError: for one sample alone (`memory.one-sample`).
        DiskError: the numbers cannot be written (`disk.write`).
    """
    if getattr(run.recipe.objective, "reference", None) != "cached":
        return run, []
    is_off = begins_as_nothing(run.model, run.parameters)
    inputs = _inputs(run, job, is_off)
    trunk = getattr(run.objective, "trunk", None)

    @torch.no_grad()
    def measure(batch: PackedBatch) -> torch.Tensor:
        run.watchdog.beat("reference")
        off = run.model.disable_adapter() if is_off else nullcontext()
        with off, run.autocast():
            return sequence_logp(run.model, batch.to(run.device), trunk)

    run.model.eval()
    notes: list[str] = []
    loaders = [
        replace(
            loader, reference=ReferencePass(loader, inputs, measure).values(reporter, notes.append)
        )
        for loader in (run.loader, run.validation)
        if loader is not None
    ]
    run = replace(run, loader=loaders[0], validation=loaders[1] if len(loaders) > 1 else None)
    return run, notes


def _inputs(run: Run, job: Job, is_off: bool) -> dict[str, str]:
    """What decides the numbers, but for the sequences: weights, arithmetic, versions."""
    recipe: Recipe = run.recipe
    weights = {k: v for k, v in job.fingerprints.items() if k.startswith(("base", "model."))}
    method = recipe.method.model_dump_json()
    # New adapters that change nothing, and the base's own weights, begin as the base does.
    starts_as_base = is_off or recipe.method.name in ("full", "freeze")
    return {
        **weights,
        "merged": str(recipe.model.merge_adapter),
        "start": "base" if starts_as_base else f"{method}, seed {recipe.train.seed}",
        "dtype": f"{recipe.model.dtype}, {run.autocast_dtype}",
        "quantize": recipe.model.quantize,
        "device": run.device.type,
        "versions": f"{PASS_VERSION}, {torch.__version__}, transformers {version('transformers')}",
    }


@dataclass(frozen=True)
class ReferencePass:
    """Log-probabilities of all sequences of a loader, from disk or computed.

    Args:
        loader: of the sequences.
        inputs: what else decides the numbers.
        measure: gives `logp_S` of a batch on the host.
        folder: of all passes; None is the cache's.
    """

    loader: Loader
    inputs: dict[str, str]
    measure: Callable[[PackedBatch], torch.Tensor]
    folder: Path | None = None

    def values(self, reporter: Reporter, note: Callable[[str], None]) -> Values:
        """The number of each sequence of the store, NaN for those that the loader leaves out.

        Args:
            reporter: shows the pass.
            note: is told where the numbers come from.
        """
        place = (self.folder or cache_folder("references")) / self._key()
        samples = self.loader.samples
        damage = find_damage(place) if place.exists() else None
        if not place.exists() or damage:
            if damage:
                note(f"kept log-probabilities are damaged and made again ({place}: {damage})")
            with _workplace(place) as parts:
                found = self._compute(parts, reporter)
                with atomic_directory(place) as temporary:
                    np.save(temporary / "values.npy", found)
                    write_manifest(temporary, {"inputs": {**self.inputs}})
            note(f"log-probabilities of {len(samples):,} samples before training: in {place}")
        else:
            found = np.load(place / "values.npy")
            note(f"log-probabilities of {len(samples):,} samples before training: from {place}")
        values = np.full(len(self.loader.store.lengths()), np.nan, dtype=np.float32)
        values[self._sequences(samples)] = found
        return values

    def _key(self) -> str:
        loader = self.loader
        order = hashlib.sha256(np.ascontiguousarray(loader.samples).tobytes()).hexdigest()
        about = [loader.store.content_key, order, loader.pad_to, loader.share_prefixes]
        text = json.dumps([self.inputs, about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _sequences(self, samples: npt.NDArray[np.int64]) -> list[int]:
        store = self.loader.store
        return [index for sample in samples for index in store.sequences_of(int(sample))]

    def _compute(self, parts: Path, reporter: Reporter) -> Values:
        """All numbers in the order of the samples; finished parts of an earlier pass are taken."""
        size = max(PART_SAMPLES, len(self.loader.samples) // 1000)
        starts = range(0, len(self.loader.samples), size)
        # A batch tells its sequences by their numbers, which stand where the results will.
        num_sequences = len(self.loader.store.lengths())
        numbered = replace(self.loader, reference=np.arange(num_sequences, dtype=np.float64))
        found: list[Values] = []
        for start in reporter.track(LABEL, starts, len(starts)):
            number = start // size
            values = _read_part(parts, number)
            if values is None:
                part = replace(numbered, samples=self.loader.samples[start : start + size])
                # What fitted once is tried first in the next part.
                values, tokens = self._measure_part(part)
                numbered = replace(numbered, micro_batch_tokens=tokens)
                _write_part(parts, number, values)
            found.append(values)
        return np.concatenate(found) if found else np.empty(0, dtype=np.float32)

    def _measure_part(self, loader: Loader) -> tuple[Values, int]:
        """The numbers of a part, and the tokens at once with which memory sufficed."""
        values = np.full(len(loader.store.lengths()), np.nan, dtype=np.float32)
        try:
            for batch in loader.all_batches():
                if batch.reference_S is None or not batch.row_N.numel():
                    continue
                numbers = batch.reference_S.numpy().astype(np.int64)
                logp_S = self.measure(replace(batch, reference_S=None))
                values[numbers] = logp_S.float().cpu().numpy()
            return values[self._sequences(loader.samples)], loader.micro_batch_tokens
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            problem = str(error)
        free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if loader.micro_batch_tokens <= SMALLEST_TOKENS:
            samples: Sequence[int] = loader.samples.tolist()
            raise OutOfMemoryError(
                "memory.one-sample",
                f"one of {', '.join(map(str, loader.origins(samples[:8])))}",
                found=f"no memory for a forward of it alone ({problem.splitlines()[0][:200]})",
                expected="a sample that fits",
                try_="a smaller data.max_length, or model.quantize=nf4",
            )
        return self._measure_part(
            replace(loader, micro_batch_tokens=loader.micro_batch_tokens // 2)
        )


# On disk


@contextmanager
def _workplace(place: Path) -> Generator[Path]:
    """The folder of finished parts; one of its own while another process makes the same.

    What stops a pass, a signal or an error, leaves them there for the next start.
    """
    shared = place.with_name(f"{place.name}.parts")
    shared.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(directory_lock(shared))
            workplace = shared
            sweep_temporaries(shared)
        except LockError:
            workplace = Path(stack.enter_context(TemporaryDirectory(dir=place.parent)))
        yield workplace
        shutil.rmtree(workplace, ignore_errors=True)


def _write_part(folder: Path, number: int, values: Values) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    content = buffer.getvalue()
    write_atomic(folder / f"part-{number:06d}-{_hash(content)}.npy", content)


def _read_part(folder: Path, number: int) -> Values | None:
    """A part that an earlier pass finished, None if there is none or a damaged one."""
    for file in folder.glob(f"part-{number:06d}-*.npy"):
        content = file.read_bytes()
        if file.name == f"part-{number:06d}-{_hash(content)}.npy":
            return np.load(io.BytesIO(content))
        file.unlink()
    return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

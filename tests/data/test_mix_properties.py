"""Order, mixing, steps and packing together: a Loader loses and doubles nothing."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_byte_tokenizer
from tunesmith.config.recipe import SourceConfig
from tunesmith.data.build import open_store
from tunesmith.data.loader import Loader
from tunesmith.data.mix import Share, Strategy, share_of_rank
from tunesmith.data.sources import Source
from tunesmith.data.store import StoreInputs, TokenStore
from tunesmith.data.templates import Renderer
from tunesmith.types import SilentReporter

NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Forty samples of 30 to 150 tokens; every third has two answers."""
    folder = tmp_path_factory.mktemp("mixed")
    path = folder / "d.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(NUM_SAMPLES):
            messages = [
                message
                for turn in range(1 + (number % 3 == 0))
                for message in (
                    {"role": "user", "content": f"q{number}"},
                    {"role": "assistant", "content": f"a{number}{turn}" * (1 + number % 13)},
                )
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    sources = [Source(SourceConfig(path="d"), (path,))]
    made = StoreInputs(sources, Renderer(make_byte_tokenizer()), folder=folder / "stores")
    return open_store(made, SilentReporter())


@st.composite
def shares_of(draw: st.DrawFn) -> tuple[Share, ...]:
    sizes = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3).filter(any))
    return tuple(
        Share.by_weight(size, draw(st.floats(0.05, 3)))
        if draw(st.booleans())
        else Share.by_count(size, draw(st.integers(1, 25)))
        for size in sizes
    )


EXAMPLES = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@EXAMPLES
@given(
    shares=shares_of(),
    global_batch=st.integers(1, 50),
    budget=st.integers(1, 400),
    max_length=st.integers(40, 200),
    seed=st.integers(0, 2**32),
    mix=st.sampled_from(["shuffle", "concat", "interleave"]),
)
def test_epochs_of_a_loader(
    store: TokenStore,
    shares: tuple[Share, ...],
    global_batch: int,
    budget: int,
    max_length: int,
    seed: int,
    mix: Strategy,
) -> None:
    """Over any epochs, two samples of a source are seen equally often, or one of them once more."""
    num_used = sum(share.size for share in shares)
    chosen = np.sort(np.random.default_rng(seed).permutation(NUM_SAMPLES)[:num_used])
    loader = Loader(
        store, chosen, global_batch, budget, max_length, seed, shares, mix, share_prefixes=False
    )
    num_epochs = 3
    seen: Counter[int] = Counter()
    for epoch in range(num_epochs):
        of_epoch: list[int] = []
        for within in range(loader.steps_per_epoch):
            batch = loader.batch(epoch * loader.steps_per_epoch + within)
            assert batch.epoch == epoch
            assert len(batch.sample_ids) == global_batch or within == loader.steps_per_epoch - 1
            of_epoch += batch.sample_ids
            # Packing: every sequence once, all of it that fits, none over the budget but alone.
            lengths = Counter(n for part in batch.micro_batches for n in part.segments.lengths)
            assert lengths == Counter(
                min(store.length(sample), max_length) for sample in batch.sample_ids
            )
            for part in batch.micro_batches:
                assert part.num_tokens <= budget or len(part.segments.lengths) == 1
            assert batch.num_tokens == sum(size * count for size, count in lengths.items())
        assert len(of_epoch) == loader.samples_per_epoch == sum(share.draws for share in shares)
        seen.update(of_epoch)
    start = 0
    for share in shares:
        times = [seen[int(sample)] for sample in chosen[start : start + share.size]]
        start += share.size
        assert sum(times) == num_epochs * share.draws
        if times:
            assert max(times) - min(times) <= 1
    assert sum(seen.values()) == num_epochs * loader.samples_per_epoch


@EXAMPLES
@given(
    num_samples=st.integers(1, NUM_SAMPLES),
    global_batch=st.integers(1, 50),
    world_size=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_one_source_over_ranks(
    store: TokenStore, num_samples: int, global_batch: int, world_size: int, seed: int
) -> None:
    """Each epoch has every sample once, over all ranks together."""
    loader = Loader(store, np.arange(num_samples), global_batch, 200, 1000, seed)
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        batches = [np.array(loader.batch(step).sample_ids) for step in steps]
        over_ranks = [
            int(sample)
            for ids in batches
            for rank in range(world_size)
            for sample in share_of_rank(ids, rank, world_size)
        ]
        assert sorted(over_ranks) == list(range(num_samples))


@EXAMPLES
@given(num_samples=st.integers(1, NUM_SAMPLES), budget=st.integers(1, 400))
def test_evaluation_sees_every_sample_once(
    store: TokenStore, num_samples: int, budget: int
) -> None:
    loader = Loader(store, np.arange(num_samples), 3, budget, 1000, seed=0, share_prefixes=False)
    batches = list(loader.all_batches())
    lengths = sorted(length for batch in batches for length in batch.segments.lengths)
    assert lengths == sorted(store.lengths()[:num_samples].tolist())
    targets = Counter(int(sample) for batch in batches for sample in batch.sample_N)
    supervised = store.supervised_of_samples()
    assert targets == {sample: int(supervised[sample]) for sample in range(num_samples)}

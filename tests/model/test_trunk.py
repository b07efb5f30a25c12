"""The cached trunk: the same losses with and without it, whatever happens to its files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from conftest import TINY_SIZES
from tunesmith.config.recipe import FreezeConfig, FullConfig, LoraConfig
from tunesmith.data.pack import build_batch, pack_sequences
from tunesmith.data.tokenize import TokenSequence
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.layers import decoder_of
from tunesmith.model.load import random_model
from tunesmith.model.trunk import CachedTrunk, fingerprint, open_trunk, segment_keys
from tunesmith.model.trunk_cache import TrunkCache, room_for
from tunesmith.objectives.lm import SftObjective, decode
from tunesmith.types import PackedBatch

SIZES = {**TINY_SIZES, "num_hidden_layers": 4, "pad_token_id": 0}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=True)
CONFIGS = {
    "llama": LLAMA,
    "qwen3": Qwen3Config(**SIZES),
    "gemma2, windows in turns": Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3, rotary tables by layer": Gemma3TextConfig(
        **SIZES, sliding_window=4, query_pre_attn_scalar=8, sliding_window_pattern=2
    ),
}
FREEZE = FreezeConfig(name="freeze", layers=1)
LORA = LoraConfig(rank=4, alpha=8.0, layers=2)


def build(config: Any, method: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return attach(random_model(config, is_bf16=False).to(dtype), method).to(dtype)


def make_sequences(count: int = 12) -> list[tuple[int, TokenSequence]]:
    rng = np.random.default_rng(0)
    made: list[tuple[int, TokenSequence]] = []
    for number in range(count):
        length = int(rng.integers(3, 20))
        ids = rng.integers(1, 101, length).astype(np.int32)
        made.append((number, TokenSequence(ids, ((length // 2, length - length // 2, 1.0),))))
    return made


def batches(seed: int, count: int = 12) -> list[PackedBatch]:
    """One epoch in an order of its own, four sequences a batch."""
    sequences = make_sequences(count)
    order = np.random.default_rng(seed).permutation(count)
    return [build_batch([sequences[i] for i in order[k : k + 4]]) for k in range(0, count, 4)]


def open_in(folder: Path, model: Any, **changes: Any) -> CachedTrunk:
    notes: list[str] = []
    values: dict[str, Any] = {"num_tokens": 200, "note": notes.append, **changes}
    trunk = open_trunk(model, folder, **values)
    assert trunk is not None, notes
    return trunk


def train(model: Any, trunk: CachedTrunk | None, steps: int = 20) -> list[float]:
    """Losses of some epochs, each in another order."""
    objective = SftObjective(trunk=trunk)
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        for batch in batches(seed=len(losses)):
            loss = objective.step(model, batch).loss_sum / batch.weight_N.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses[:steps]


class Calls:
    """Counts the forwards of each layer."""

    def __init__(self, model: Any) -> None:
        self.counts = [0] * len(decoder_of(model).layers)
        for number, layer in enumerate(decoder_of(model).layers):
            layer.register_forward_pre_hook(lambda *_, n=number: self._count(n))

    def _count(self, number: int) -> None:
        self.counts[number] += 1


# Products of other shapes may round otherwise; on a tiny model the losses are equal bit for bit.
@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [(FREEZE, torch.float64, 1e-11), (LORA, torch.float32, 2e-5)],
    ids=["freeze", "lora"],
)
def test_twenty_steps_are_the_same(
    method: Any, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    plain = train(build(LLAMA, method, dtype), None)
    model = build(LLAMA, method, dtype)
    trunk = open_in(tmp_path, model)
    calls = Calls(model)
    cached = train(model, trunk)
    assert cached == pytest.approx(plain, rel=tolerance)
    assert cached[-1] < cached[0]
    # 20 steps are six full epochs and two batches: the lower layers ran in the first epoch only.
    assert calls.counts[0] == 3
    assert calls.counts[-1] == 21


@pytest.mark.parametrize("name", CONFIGS)
def test_halves_make_the_whole(name: str, tmp_path: Path) -> None:
    model = build(CONFIGS[name], FREEZE).eval()
    trunk = open_in(tmp_path, model)
    (batch, *_) = batches(0)
    with torch.no_grad():
        whole = decode(model, batch)
        for _ in range(2):  # computed, then read
            assert torch.equal(trunk.decode(model, batch), whole)
    assert len(trunk.cache) == 4


def test_the_first_time_equals_the_second_bit_for_bit(tmp_path: Path) -> None:
    """So a run that is interrupted and goes on has the numbers of one that is not."""
    model = build(LLAMA, LORA, torch.float32)
    trunk = open_in(tmp_path, model)
    for batch in batches(0):
        computed, read = trunk.decode(model, batch), trunk.decode(model, batch)
        assert torch.equal(computed, read)


def test_a_batch_of_known_and_new_sequences(tmp_path: Path) -> None:
    model = build(LLAMA, FREEZE)
    trunk = open_in(tmp_path, model)
    sequences = make_sequences()
    trunk.decode(model, build_batch([sequences[3], sequences[1]]))
    calls = Calls(model)
    mixed = build_batch(sequences[:5])
    with torch.no_grad():
        found, expected = trunk.decode(model, mixed), decode(model, mixed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(trunk.cache) == 5
    assert calls.counts[0] == 2


def test_a_batch_with_a_shared_prefix(tmp_path: Path) -> None:
    model = build(LLAMA, FREEZE)
    trunk = open_in(tmp_path, model)
    common = np.arange(1, 65, dtype=np.int32)
    sequences = [
        (n, TokenSequence(np.concatenate([common, common[: n + 2] + 20 * n]), ((65, n + 1, 1.0),)))
        for n in (1, 2, 3)
    ]
    (forest,) = pack_sequences([s.ids for _, s in sequences], 200, share_prefixes=True)
    batch = build_batch(sequences, forest)
    assert batch.segments.parents
    with torch.no_grad():
        whole = decode(model, batch)
        for _ in range(2):
            torch.testing.assert_close(trunk.decode(model, batch), whole, rtol=0, atol=1e-12)
    # Children with the same tokens behind another prefix are something else.
    assert len(set(segment_keys(batch.ids_T, batch.segments))) == 4
    assert len(trunk.cache) == 4


def test_only_the_head_is_trained(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    model = build(config, FreezeConfig(name="freeze", layers=1, head=True))
    for layer in decoder_of(model).layers:
        layer.requires_grad_(False)
    trunk = open_in(tmp_path, model)
    (batch, *_) = batches(0)
    with torch.no_grad():
        assert torch.equal(trunk.decode(model, batch), decode(model, batch))


def test_what_cannot_be_kept_is_computed(tmp_path: Path) -> None:
    notes: list[str] = []

    def opened(model: Any) -> Any:
        return open_trunk(model, tmp_path, num_tokens=1, note=notes.append)

    assert opened(build(LLAMA, FullConfig(name="full"))) is None
    assert notes == []
    with_dropout = LlamaConfig(**SIZES, attention_dropout=0.5)
    assert opened(build(with_dropout, FREEZE)) is None
    assert "dropout" in notes[-1]
    gpt2 = GPT2Config(
        vocab_size=101, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    # Its position embedding is added outside the embedding: the upper half would add it again.
    assert opened(build(gpt2, FREEZE)) is None
    assert "differs from the whole" in notes[-1]


def test_a_second_run_at_the_same_time_computes(tmp_path: Path) -> None:
    model, notes = build(LLAMA, FREEZE), []
    first = open_in(tmp_path, model)
    assert open_trunk(model, tmp_path, num_tokens=1, note=notes.append) is None
    assert "another run uses it" in notes[0]
    del first


def test_fingerprint_follows_what_decides_the_rows() -> None:
    model = build(LLAMA, FREEZE)

    def name(cut: int = 3, dtype: Any = torch.float64, autocast: Any = None) -> str:
        return fingerprint(decoder_of(model), cut, dtype, autocast)

    before = name()
    assert name() == before
    assert len({before, name(cut=2), name(dtype=torch.float32), name(autocast=torch.bfloat16)}) == 4
    with torch.no_grad():
        decoder_of(model).layers[3].mlp.up_proj.weight += 1  # above the cut
        assert name() == before
        decoder_of(model).layers[2].mlp.up_proj.weight[0, 0] += 1e-6
    assert name() != before


def test_keys_follow_the_tokens_alone() -> None:
    sequences = make_sequences()
    first, second = build_batch(sequences[:4]), build_batch([sequences[2], sequences[0]])
    keys = segment_keys(first.ids_T, first.segments)
    assert len(set(keys)) == 4
    assert segment_keys(second.ids_T, second.segments) == [keys[2], keys[0]]


# The files


@pytest.fixture
def open_cache(tmp_path: Path) -> Callable[..., TrunkCache]:
    def opened(max_bytes: int = 10**6, notes: list[str] | None = None) -> TrunkCache:
        said = [] if notes is None else notes
        return TrunkCache(tmp_path / "c", 8, torch.bfloat16, max_bytes=max_bytes, note=said.append)

    return opened


def rows(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()


def key(number: int) -> bytes:
    return bytes([number]) * 16


def read(cache: TrunkCache, number: int, count: int) -> torch.Tensor | None:
    out = torch.empty(count, 8, dtype=torch.bfloat16)
    return out if cache.read(key(number), out) else None


def filled(open_cache: Callable[..., TrunkCache]) -> TrunkCache:
    cache = open_cache()
    cache.write([key(1), key(2)], torch.cat([rows(1, 5), rows(2, 3)]), [5, 3])
    cache.write([key(3)], rows(3, 4), [4])
    return cache


def test_what_is_written_is_read_also_by_the_next_process(
    open_cache: Callable[..., TrunkCache],
) -> None:
    cache = filled(open_cache)
    assert read(cache, 4, 5) is None
    del cache
    cache = open_cache()
    for number, count in ((1, 5), (2, 3), (3, 4)):
        found = read(cache, number, count)
        assert found is not None and torch.equal(found, rows(number, count))
    assert read(cache, 1, 4) is None


@pytest.mark.parametrize("cut_bytes", [1, 20, 39])
def test_a_record_cut_off_is_forgotten(
    open_cache: Callable[..., TrunkCache], tmp_path: Path, cut_bytes: int
) -> None:
    del_me = filled(open_cache)
    del del_me
    index = tmp_path / "c" / "index.bin"
    os.truncate(index, index.stat().st_size - cut_bytes)
    cache = open_cache()
    assert read(cache, 3, 4) is None
    assert read(cache, 2, 3) is not None
    cache.write([key(3)], rows(3, 4), [4])
    found = read(cache, 3, 4)
    assert found is not None and torch.equal(found, rows(3, 4))


def test_rows_that_were_not_written_are_forgotten(
    open_cache: Callable[..., TrunkCache], tmp_path: Path
) -> None:
    cache = filled(open_cache)
    del cache
    file = tmp_path / "c" / "rows.bin"
    os.truncate(file, file.stat().st_size - 1)
    cache = open_cache()
    assert read(cache, 3, 4) is None and read(cache, 2, 3) is not None


def test_garbled_rows_are_found_out(open_cache: Callable[..., TrunkCache], tmp_path: Path) -> None:
    cache = filled(open_cache)
    del cache
    file = tmp_path / "c" / "rows.bin"
    data = bytearray(file.read_bytes())
    data[6 * 16] ^= 1  # in the second sequence
    file.write_bytes(data)
    cache = open_cache()
    assert read(cache, 2, 3) is None and read(cache, 2, 3) is None
    assert read(cache, 1, 5) is not None
    cache.write([key(2)], rows(2, 3), [3])
    assert read(cache, 2, 3) is not None


def test_what_does_not_fit_is_left_out_with_a_note(open_cache: Callable[..., TrunkCache]) -> None:
    notes: list[str] = []
    cache = open_cache(8 * 16, notes)
    cache.write([key(1), key(2), key(3)], rows(0, 5 + 4 + 3), [5, 4, 3])
    assert [number for number in (1, 2, 3) if key(number) in cache] == [1, 3]
    assert cache.used_bytes == 8 * 16
    cache.write([key(4)], rows(0, 1), [1])
    assert len(notes) == 1 and "full" in notes[0]


def test_the_least_used_makes_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        cache = TrunkCache(tmp_path / name, 8, torch.bfloat16, max_bytes=10**6, note=print)
        cache.write([key(1)], rows(1, 10), [10])
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
        del cache
    in_use = TrunkCache(tmp_path / "old", 8, torch.bfloat16, max_bytes=10**6, note=print)
    os.utime(tmp_path / "old", (0, 0))
    assert room_for(tmp_path, "mine", wanted_bytes=160, max_bytes=480) == 160
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert len(in_use) == 1


def test_an_index_that_cannot_grow_is_cut_back(
    open_cache: Callable[..., TrunkCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    cache = open_cache(notes=notes)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
    cache.write([key(1)], rows(1, 3), [3])
    monkeypatch.undo()
    assert notes == ["the cache of the frozen layers cannot grow: no room for its index"]
    del cache
    assert len(open_cache()) == 0

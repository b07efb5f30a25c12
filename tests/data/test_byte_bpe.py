"""tiktoken in place of `tokenizers`: the same tokens, or not used."""

import json
import random
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_byte_tokenizer
from tunesmith.data.byte_bpe import ByteBpe, find_byte_bpe

CONTEXTS = ("a{}b", "1{}2", " {} ", "'{}x", "\n{}\n", "{}{}", "。{}。", "x {} {}y")
"""A code point as a letter, digit, space or sign could be cut off from its neighbors or not."""


@pytest.fixture(scope="module")
def backends(tokenizers_folder: Path) -> Callable[[str], Any]:
    from tokenizers import Tokenizer

    known: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in known:
            known[name] = Tokenizer.from_file(str(tokenizers_folder / name / "tokenizer.json"))
        return known[name]

    return load


def twin_of(backend: Any) -> ByteBpe | None:
    return find_byte_bpe(backend, json.loads(backend.to_str()))


@lru_cache
def real_twin(name: str, backends: Callable[[str], Any]) -> ByteBpe:
    twin = twin_of(backends(name))
    assert twin is not None
    return twin


def differing(backend: Any, fast: ByteBpe, texts: list[str]) -> list[str]:
    texts = [text for text in texts if fast.can_encode(text)]
    expected = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    found = [ids.tolist() for ids in fast.encode(texts)]
    return [text for text, left, right in zip(texts, expected, found, strict=True) if left != right]


def code_points(share: float) -> list[str]:
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0xFDD0]
    return every if share >= 1 else random.Random(0).sample(every, int(share * len(every)))


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama3_1", marks=pytest.mark.slow)])
def test_unicode_is_cut_alike(name: str, backends: Callable[[str], Any]) -> None:
    backend, fast = backends(name), real_twin(name, backends)
    chars = code_points(0.002) + [chr(c) for c in range(0x300)]
    for context in CONTEXTS:
        assert differing(backend, fast, [context.replace("{}", c) for c in chars]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_all_of_unicode_is_cut_alike(name: str, backends: Callable[[str], Any]) -> None:
    backend, fast = backends(name), real_twin(name, backends)
    chars = code_points(0.25 if name == "llama3_1" else 0.4)
    for context in CONTEXTS:
        for start in range(0, len(chars), 4000):
            texts = [context.replace("{}", char) for char in chars[start : start + 4000]]
            assert differing(backend, fast, texts) == []


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=200)
@given(texts=st.lists(st.text(max_size=60), max_size=20))
def test_any_texts(texts: list[str], backends: Callable[[str], Any]) -> None:
    backend = backends("qwen3")
    assert differing(backend, real_twin("qwen3", backends), texts) == []


def test_texts_that_are_left_to_the_tokenizer(backends: Callable[[str], Any]) -> None:
    fast = real_twin("qwen3", backends)
    assert fast.can_encode("plain") and fast.can_encode("é你好")
    assert not fast.can_encode(unicodedata.normalize("NFD", "é"))  # Qwen normalizes to NFC
    assert not fast.can_encode("\ufdd0|\ufdd0")  # the separator
    assert fast.encode([]) == []
    assert [len(ids) for ids in fast.encode(["", "a", ""])] == [0, 1, 0]


def test_tokenizers_without_a_proof_have_no_twin(backends: Callable[[str], Any]) -> None:
    assert twin_of(backends("deepseek_v3")) is None  # three expressions in a row
    assert twin_of(make_byte_tokenizer().backend_tokenizer) is None  # no expression


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tree: tree["model"]["merges"].reverse(),
        lambda tree: tree["model"]["merges"].pop(),
        lambda tree: tree.update(normalizer={"type": "Lowercase"}),
        lambda tree: tree["model"].update(byte_fallback=True),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
    ids=["order", "unreachable token", "normalizer", "fallback", "inverted", "prefix"],
)
def test_what_breaks_the_proof(break_it: Callable[[Any], None]) -> None:
    from tokenizers import Tokenizer

    tree = small_tree()
    assert twin_of(Tokenizer.from_str(json.dumps(tree))) is not None
    break_it(tree)
    assert twin_of(Tokenizer.from_str(json.dumps(tree))) is None


def small_tree() -> dict[str, Any]:
    """A tokenizer in Qwen's manner with a few merges."""
    tree = json.loads(make_byte_tokenizer().backend_tokenizer.to_str())
    merges = [["a", "b"], ["ab", "c"], ["d", "e"]]
    vocabulary = tree["model"]["vocab"]
    first = max([*vocabulary.values(), *(token["id"] for token in tree["added_tokens"])]) + 1
    for number, pair in enumerate(merges):
        vocabulary["".join(pair)] = first + number
    tree["model"]["merges"] = merges
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    }
    return tree

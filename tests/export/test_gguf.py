"""GGUF files of every family, read again by transformers and, where it is installed, llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CHATML
from tunesmith.errors import ExportError, UserError
from tunesmith.export.gguf_file import FILE, export_gguf, gguf_type
from tunesmith.export.gguf_reload import llama_cpp_python, run_llama_cpp
from tunesmith.export.gguf_vocabulary import PRE_TOKENIZERS, vocabulary_of
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample, compare, logits_of
from tunesmith.export.written import Request, load_trained
from tunesmith.io.headers import check_gguf
from tunesmith.model.load import ModelSource
from tunesmith.types import SilentReporter

SAMPLES = (Sample("a", tuple(range(1, 40))), Sample("b", (256, *range(90, 120))))

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 259,
    "pad_token_id": 257,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3 narrow": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 8}),
    "gemma3 narrow": (
        "gemma3_text",
        {**GEMMA, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 8}),
}
NOT_BY_TRANSFORMERS = {"llama 3", "llama linear", "qwen3 narrow", "gemma", "gemma3 narrow"}


def make_tokenizer() -> Any:
    """Byte-level, with one merge: llama.cpp loads none without."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_family(folder: Path, name: str) -> Trained:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, values = FAMILIES[name]
    config: Any = AutoConfig.for_model(kind, **{**SIZES, **values})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() == 1 else 0.08  # norms and biases count, too
            parameter.add_(scale * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), parameter_name
    model.save_pretrained(folder / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    source = ModelSource(name, str(folder / "base"))
    return Trained(name, source, None, tokenizer, stop_ids=(259,), base_name=name)


def export(trained: Trained, folder: Path, kind: str) -> Any:
    folder.mkdir(exist_ok=True)
    request = Request("gguf", quantization=kind, samples=SAMPLES)
    written = export_gguf(trained, folder, request, SilentReporter())
    check_gguf(folder / FILE)
    return written


def python_with_llama_cpp() -> str:
    python = llama_cpp_python()
    if python is None:
        pytest.skip("no llama_cpp here, and TUNESMITH_LLAMA_CPP_PYTHON is not set")
    return python


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("llama", "gemma3") else pytest.mark.slow) for n in FAMILIES],
)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    trained = make_family(tmp_path, name)
    written = export(trained, tmp_path / "out", "f32")
    assert (written.logits is None) is (name in NOT_BY_TRANSFORMERS)
    if written.logits is not None:
        ours = logits_of(load_trained(trained, dtype="float32"), SAMPLES)
        figures = compare(ours, written.logits(SAMPLES))
        assert figures.deviations < 1e-4, figures


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    python = python_with_llama_cpp()
    trained = make_family(tmp_path, name)
    export(trained, tmp_path / "out", "f32")
    ask = {
        "samples": [list(sample.ids) for sample in SAMPLES],
        "prompts": [[{"role": "user", "content": "Hé, hehe 12!"}]],
        "greedy": [[1, 2, 3]],
        "num_tokens": 4,
        "stop_ids": [259],
    }
    said, logits = run_llama_cpp(python, tmp_path / "out" / FILE, ask)
    figures = compare(logits_of(load_trained(trained, dtype="float32"), SAMPLES), logits)
    # llama.cpp keeps keys and values in f16.
    assert figures.deviations < 0.02, figures
    text = trained.tokenizer.apply_chat_template(
        ask["prompts"][0], tokenize=False, add_generation_prompt=True
    )
    backend = trained.tokenizer.backend_tokenizer
    assert said["prompts"][0] == backend.encode_batch([text], add_special_tokens=False)[0].ids


@pytest.mark.parametrize(
    "kind",
    ["q8_0", *(pytest.param(k, marks=pytest.mark.slow) for k in ("f16", "bf16", "q5_0", "q4_0"))],
)
def test_types(kind: str, tmp_path: Path) -> None:
    import gguf

    trained = make_family(tmp_path, "llama")
    written = export(trained, tmp_path / "out", kind)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind.upper()
    outer = kind.upper() if kind in ("f16", "bf16") else "Q8_0"
    assert tensors["token_embd.weight"].tensor_type.name == outer
    assert ("embedding and head are q8_0" in written.notes) is (kind in ("q5_0", "q4_0"))


def test_rows_that_do_not_fit_blocks_stay_f16(tmp_path: Path) -> None:
    import gguf

    FAMILIES["odd"] = ("llama", {"intermediate_size": 40})
    written = export(make_family(tmp_path, "odd"), tmp_path / "out", "q8_0")
    del FAMILIES["odd"]
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert "2 matrices stay f16: rows that are no multiple of 32" in written.notes


def test_k_quants_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"export\.quantization.*q4_k_m") as caught:
        gguf_type(Request("gguf", quantization="Q4_K_M"))
    assert "llama-quantize" in str(caught.value)


@pytest.mark.slow
def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained = make_family(tmp_path, "llama")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"export\.quantization.*65,504"):
        export(trained, tmp_path / "out", "f16")


@pytest.mark.slow
def test_unknown_families_and_tokenizers_are_refused(tmp_path: Path) -> None:
    trained = make_family(tmp_path, "llama")
    trained.tokenizer.backend_tokenizer.pre_tokenizer = __import__(
        "tokenizers"
    ).pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"export\.gguf-tokenizer"):
        trained.tokenizer.backend_tokenizer.model = __import__("tokenizers").models.WordLevel(
            {"a": 0}, "a"
        )
        vocabulary_of(trained, 260)
    FAMILIES["phi"] = ("phi", {})
    strange = make_family(tmp_path, "phi")
    del FAMILIES["phi"]
    with pytest.raises(UserError, match=r"export\.gguf-family.*phi"):
        export(strange, tmp_path / "out", "f16")


def test_an_extended_vocabulary_is_filled_up(tmp_path: Path) -> None:
    trained = make_family(tmp_path, "llama")
    vocabulary = vocabulary_of(trained, 264)
    assert vocabulary.tokens[256:261:2] == ("he", "<|im_start|>", "[PAD260]")
    assert vocabulary.kinds[256:261] == (1, 3, 3, 3, 5)


SPM = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 1, "content": "<s>", "special": True},
        {"id": 2, "content": "</s>", "special": True},
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {},
        "merges": [],
    },
}


def make_spm() -> Any:
    """A tokenizer of SentencePiece's kind, as Llama 2 and Gemma have them."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tree = json.loads(json.dumps(SPM))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "h"), ("l", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o"), ("o", "r")]
    tokens += [left + right for left, right in merges]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!"]
    tree["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    tree["model"]["merges"] = merges
    for added in tree["added_tokens"]:
        added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    backend = Tokenizer.from_str(json.dumps(tree))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return made


@pytest.mark.slow
def test_llama_cpp_reads_sentencepieces_tokens(tmp_path: Path) -> None:
    python = python_with_llama_cpp()
    trained = replace(make_family(tmp_path, "llama"), tokenizer=make_spm())
    FAMILIES["spm"] = ("llama", {"vocab_size": 320})
    trained = replace(make_family(tmp_path, "spm"), tokenizer=make_spm(), stop_ids=(2,))
    del FAMILIES["spm"]
    vocabulary = vocabulary_of(trained, 320)
    assert vocabulary.model == "llama"
    assert vocabulary.adds_space
    assert vocabulary.kinds[:4] == (2, 3, 3, 6)
    export(trained, tmp_path / "out", "f32")
    words = ["hello world!", "hé 你 llor", "  hell  "]
    messages = [[{"role": "user", "content": text}] for text in words]
    ask = {"samples": [], "prompts": messages, "greedy": [], "num_tokens": 1, "stop_ids": [2]}
    said, _ = run_llama_cpp(python, tmp_path / "out" / FILE, ask)
    for each, ids in zip(messages, said["prompts"], strict=True):
        text = trained.tokenizer.apply_chat_template(each, tokenize=False)
        expected = trained.tokenizer.backend_tokenizer.encode_batch(
            [text], add_special_tokens=False
        )[0].ids
        assert ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_llama_cpp_cuts_texts_as_real_tokenizers_do(
    name: str, tokenizers_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    python = python_with_llama_cpp()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers_folder / name)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    size = max(tokenizer.get_vocab().values()) + 1
    small = {"hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
    FAMILIES["real"] = ("llama", {**small, "vocab_size": size})
    trained = make_family(tmp_path, "real")
    del FAMILIES["real"]
    trained = replace(trained, tokenizer=tokenizer, stop_ids=(int(tokenizer.eos_token_id),))
    assert vocabulary_of(trained, size).pre in PRE_TOKENIZERS.values()
    export(trained, tmp_path / "out", "q8_0")
    texts = [
        "I'll pay 12345.67 €, they'd SAY: naïve café\n\n\n  twice\t!",
        "请把下面的句子改正：他每天都很认真的学习，2024年毕业。",
        "def f(x):\n    return x**2  # ok 🎉👩‍👩‍👧\r\n",
    ]
    messages = [[{"role": "user", "content": text}] for text in texts]
    ask = {"samples": [], "prompts": messages, "greedy": [], "num_tokens": 1, "stop_ids": [2]}
    said, _ = run_llama_cpp(python, tmp_path / "out" / FILE, ask)
    for text, ids in zip(texts, said["prompts"], strict=True):
        encoded = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
        assert ids == encoded[0].ids


def test_a_file_that_llama_cpp_does_not_read_is_told(tmp_path: Path) -> None:
    import sys

    with pytest.raises(ExportError, match=r"export\.llama-cpp"):
        run_llama_cpp(sys.executable, tmp_path / "none.gguf", {"samples": []})


def test_llama_3_stretches_long_waves_alone() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from tunesmith.export.gguf_families import rope_factors

    config = LlamaConfig(**{**SIZES, "hidden_size": 256}, rope_parameters=LLAMA3)
    factors = rope_factors(config)
    assert factors is not None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    torch.testing.assert_close(1 / factors * torch.tensor(plain).float(), scaled)

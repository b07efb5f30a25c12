"""GGUF files read again: by transformers, and by llama.cpp itself where it is installed.

llama.cpp runs in a process of its own, of the Python that `TUNESMITH_LLAMA_CPP_PYTHON` names or of
this one if it can import `llama_cpp`: it compares logits, the tokens of prompts, the prompts that
the template in the file makes, and the likeliest answers.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ExportError
from tunesmith.export.trained import Trained
from tunesmith.export.verify import (
    LOSSY,
    TOLERANCES,
    Prompt,
    Sample,
    check_logits,
    check_prompts,
    compare,
    logits_of,
    prompt_ids,
)
from tunesmith.export.written import Conversation, Request, attention_of, load_trained

PYTHON = "TUNESMITH_LLAMA_CPP_PYTHON"
CHILD = Path(__file__).with_name("llama_cpp_child.py")

GREEDY_PROMPTS, GREEDY_TOKENS = 3, 32
CHILD_SECONDS = 1800

READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Of the families written here; transformers 5.23 has no reader for the first Gemma."""


def gguf_logits(
    file: Path, trained: Trained, config: Any
) -> Callable[[Sequence[Sample]], list[torch.Tensor]] | None:
    """What gives the logits of a GGUF file by transformers; None if it cannot read such a one."""
    rope = config.rope_parameters or {}
    kinds = {each.get("rope_type", "default") for each in rope.values() if isinstance(each, dict)}
    is_scaled = {*kinds, rope.get("rope_type", "default")} != {"default"}
    if config.model_type not in READ_BY_TRANSFORMERS or is_scaled:
        return None
    # transformers takes these for what they are in the released models.
    if config.model_type == "qwen3" and config.head_dim != 128:
        return None
    if config.model_type.startswith("gemma") and config.query_pre_attn_scalar != 256:
        return None

    def logits(samples: Sequence[Sample]) -> list[torch.Tensor]:
        from transformers import AutoModelForCausalLM, GgufConfig

        with redirect_stderr(io.StringIO()):  # a bar of the library's own
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                attn_implementation=attention_of(config),
                trust_remote_code=False,
                quantization_config=GgufConfig(dequantize=True),
            )
        return logits_of(model.eval(), samples)

    return logits


def gguf_prompts(file: Path, trained: Trained) -> Callable[[Conversation], list[int]] | None:
    """What renders conversations with the template that the file holds."""
    if not trained.tokenizer.chat_template:
        return None
    import gguf

    field: Any = gguf.GGUFReader(file).fields["tokenizer.chat_template"]
    template = bytes(field.parts[field.data[0]]).decode()

    def ids(messages: Conversation) -> list[int]:
        return prompt_ids(trained.tokenizer, messages, chat_template=template)

    return ids


def llama_cpp_checks(
    file: Path, trained: Trained, request: Request, tolerance: str
) -> tuple[tuple[Callable[[Sequence[Prompt]], str], ...], tuple[str, ...]]:
    """Comparisons by llama.cpp itself, and what is worth saying where there is none."""
    python = llama_cpp_python()
    if python is None:
        note = f"not run by llama.cpp: install llama-cpp-python, or set {PYTHON}"
        return (), (note,)

    def check(prompts: Sequence[Prompt]) -> str:
        return _check_by_llama_cpp(python, file, trained, request, tolerance, prompts)

    return (check,), ()


def llama_cpp_python() -> str | None:
    """A Python that can import llama_cpp; None if none is known."""
    named = os.environ.get(PYTHON)
    if named:
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


def _check_by_llama_cpp(
    python: str,
    file: Path,
    trained: Trained,
    request: Request,
    tolerance: str,
    prompts: Sequence[Prompt],
) -> str:
    """Compares with llama.cpp; a line on what it saw.

    Raises:
        ExportError: it cannot load the file (`export.llama-cpp`), or something differs.
    """
    where = f"{file.name} by llama.cpp"
    said, logits = run_llama_cpp(
        python,
        file,
        {
            "samples": [list(sample.ids) for sample in request.samples],
            "prompts": [list(prompt.messages) for prompt in prompts],
            "greedy": [list(prompt.ids) for prompt in prompts[:GREEDY_PROMPTS]],
            "num_tokens": GREEDY_TOKENS,
            "stop_ids": list(trained.stop_ids),
        },
    )
    model = load_trained(trained, dtype=request.compute)
    figures = compare(logits_of(model, request.samples), logits)
    check_logits(figures, TOLERANCES[tolerance], request.samples, trained.tokenizer, where)
    check_prompts(prompts, said["prompts"], where)
    ours = [_greedy(model, prompt.ids, trained.stop_ids) for prompt in prompts[:GREEDY_PROMPTS]]
    same = sum(a == b for a, b in zip(ours, said["greedy"], strict=True))
    word = "near" if tolerance in LOSSY else "same as"
    return (
        f"{word} what was trained, run by llama.cpp {said['version']}: {figures}; "
        f"{len(prompts)} prompts token by token; {same} of {len(ours)} likeliest answers of up to "
        f"{GREEDY_TOKENS} tokens are the same"
    )


def run_llama_cpp(
    python: str, file: Path, ask: dict[str, Any]
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Lets llama.cpp read a file; what it says, and the logits of the samples.

    Raises:
        ExportError: it fails (`export.llama-cpp`).
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as temporary:
        place = Path(temporary) / "logits.npz"
        given = json.dumps({**ask, "model": str(file), "out": str(place)})
        try:
            done = subprocess.run(  # noqa: S603 - the user's own Python, our own script
                [python, str(CHILD)],
                input=given,
                capture_output=True,
                text=True,
                timeout=CHILD_SECONDS,
                check=True,
            )
            said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            text = str(getattr(error, "stderr", "") or error).strip()
            raise ExportError(
                "export.llama-cpp",
                str(file),
                found=(text.splitlines() or ["no answer"])[-1][:300],
                expected="a file that llama.cpp loads",
            ) from error
        import numpy as np

        with np.load(place) as stored:
            logits = [torch.from_numpy(stored[f"s{n}"]) for n in range(len(ask["samples"]))]
    return said, logits


@torch.no_grad()
def _greedy(model: Any, ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The likeliest continuation, the token that ends it left out."""
    out = model.generate(
        input_ids=torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )
    found = out[0, len(ids) :].tolist()
    return [token for token in found if token not in stop_ids]

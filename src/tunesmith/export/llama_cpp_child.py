"""Runs in a Python that has llama_cpp: reads a GGUF file and tells what it makes of samples.

The question comes as JSON on standard input: `model`, `out`, `samples` (token ids), `prompts`
(messages), `greedy` (token ids to go on from), `num_tokens`, `stop_ids`. Logits go into the file
`out`, the rest as one line of JSON to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

api: Any = llama_cpp

ERROR = 4
"""Level of ggml's log."""


def main() -> None:
    """Answers one question."""
    ask: dict[str, Any] = json.load(sys.stdin)
    longest = max((len(ids) for ids in (*ask["samples"], *ask["greedy"])), default=1)
    model = _Model(ask["model"], longest + int(ask["num_tokens"]) + 8)
    logits = {f"s{n}": model.logits(ids) for n, ids in enumerate(ask["samples"])}
    np.savez(ask["out"], **logits)
    stop_ids = set(ask["stop_ids"])
    answer = {
        "version": api.__version__,
        "prompts": [model.prompt(messages) for messages in ask["prompts"]],
        "greedy": [model.go_on(ids, ask["num_tokens"], stop_ids) for ids in ask["greedy"]],
    }
    sys.stdout.write(json.dumps(answer) + "\n")


class _Model:
    """A GGUF file in llama.cpp, on the CPU."""

    def __init__(self, file: str, num_tokens: int) -> None:
        said: list[str] = []

        def keep(level: int, text: bytes, _: object) -> None:
            if level >= ERROR:
                said.append(text.decode(errors="replace").strip())

        self._log = api.llama_log_callback(keep)  # kept alive as long as llama.cpp may call it
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        how: Any = api.llama_model_default_params()
        how.n_gpu_layers = 0
        # Weights stay as the file has them: rearranged for AMX, quantized ones end llama.cpp
        # 0.3.36 with a segmentation fault on a Xeon of 2 cores.
        how.use_extra_bufts = False
        self._model = api.llama_model_load_from_file(file.encode(), how)
        if not self._model:
            raise SystemExit(f"llama.cpp says: {'; '.join(said[:2])}")
        what: Any = api.llama_context_default_params()
        what.n_ctx = what.n_batch = what.n_ubatch = num_tokens
        what.n_threads = what.n_threads_batch = max(1, (os.cpu_count() or 2) // 2)
        self._context = api.llama_init_from_model(self._model, what)
        self._vocabulary = api.llama_model_get_vocab(self._model)
        self._width = int(api.llama_vocab_n_tokens(self._vocabulary))
        self._batch = api.llama_batch_init(num_tokens, 0, 1)

    def logits(self, ids: Sequence[int]) -> Any:
        """The logits after every token, `[T, V]`."""
        self._forget()
        self._read(ids, 0)
        rows = api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, shape=(len(ids), self._width)).astype(np.float32).copy()

    def go_on(self, ids: Sequence[int], num_tokens: int, stop_ids: set[int]) -> list[int]:
        """The likeliest tokens after a prompt, up to one that ends the answer."""
        self._forget()
        found: list[int] = []
        given, start = list(ids), 0
        while len(found) < num_tokens:
            self._read(given, start)
            start += len(given)
            row = api.llama_get_logits_ith(self._context, len(given) - 1)
            token = int(np.ctypeslib.as_array(row, shape=(self._width,)).argmax())
            if token in stop_ids:
                break
            found.append(token)
            given = [token]
        return found

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation by the template in the file, tokenized by llama.cpp."""
        from llama_cpp.llama_chat_format import (  # pyright: ignore[reportMissingImports]
            Jinja2ChatFormatter,
        )

        formatter: Any = Jinja2ChatFormatter(
            template=self._value("tokenizer.chat_template"),
            eos_token=self._text(api.llama_vocab_eos(self._vocabulary)),
            bos_token=self._text(api.llama_vocab_bos(self._vocabulary)),
        )
        return self.tokens(formatter(messages=messages).prompt)

    def tokens(self, text: str) -> list[int]:
        """A text that a template has rendered, as token ids."""
        raw = text.encode()
        place = (ctypes.c_int32 * (len(raw) + 8))()
        count = api.llama_tokenize(self._vocabulary, raw, len(raw), place, len(place), False, True)
        return list(place[:count])

    def _value(self, key: str) -> str:
        size = api.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return ""
        place = ctypes.create_string_buffer(size + 1)
        api.llama_model_meta_val_str(self._model, key.encode(), place, size + 1)
        return place.value.decode()

    def _text(self, token: int) -> str:
        return api.llama_vocab_get_text(self._vocabulary, token).decode() if token >= 0 else ""

    def _forget(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def _read(self, ids: Sequence[int], start: int) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for number, token in enumerate(ids):
            batch.token[number], batch.pos[number] = token, start + number
            batch.seq_id[number][0], batch.n_seq_id[number] = 0, 1
            batch.logits[number] = True
        if api.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp cannot read the tokens")


if __name__ == "__main__":
    main()

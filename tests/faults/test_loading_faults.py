"""The rows of the fault matrix about what strangers wrote: models, templates, archives, names."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from safetensors import SafetensorError, safe_open
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.config.load import load_recipe
from tunesmith.data.templates.sandbox import Limits, TemplateLimitError, compile_template
from tunesmith.errors import ModelError, RecipeError, UserError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.io.archive import unpack
from tunesmith.io.headers import check_gguf, check_safetensors
from tunesmith.io.paths import resolve_inside
from tunesmith.model import load as load_module
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.types import SilentReporter


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that an attack leaves behind; each test must end without it."""
    return tmp_path / "it-ran"


@pytest.fixture(autouse=True)
def _nothing_ran(trace: Path) -> Iterator[None]:
    yield
    assert not trace.exists(), "code from the data was run"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A sound model, to be made bad."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def source_of(folder: Path) -> ModelSource:
    return ModelSource(folder.name, str(folder))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def code_of(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert caught.value.found and caught.value.expected
    return caught.value.code


def load_everything(folder: Path) -> Any:
    source = source_of(folder)
    check_weights_exist(source)
    load_tokenizer(source)
    load_config(source)
    return load_model(source)


# Row 53: pickles


@pytest.fixture
def payload(trace: Path) -> bytes:
    content = pickle.dumps(Payload(trace))
    pickle.loads(content)
    assert trace.exists(), "the attack itself must work"
    trace.unlink()
    return content


PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "consolidated.00.pth")


@pytest.mark.parametrize("name", PICKLES)
def test_row_53_pickle_in_weights_is_refused(folder: Path, payload: bytes, name: str) -> None:
    """Weights that exist as a pickle alone: refused, by the early check and by the loader."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(payload)
    assert code_of(check_weights_exist, source_of(folder)) == "model.pickle"
    assert code_of(load_model, source_of(folder)) == "model.pickle"


def test_row_53_pickle_beside_safetensors_is_not_read(folder: Path, payload: bytes) -> None:
    """Pickles beside sound weights, and settings that ask for them: the sound ones are loaded."""
    for name in (*PICKLES, "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(payload)
    edit(folder / "config.json", transformers_weights="adapter_model.bin")
    assert load_everything(folder).config.hidden_size == 32


def test_row_53_pickle_named_by_an_index_is_refused(folder: Path, payload: bytes) -> None:
    """An index of safetensors that names a pickle: refused."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(check_weights_exist, source_of(folder)) == "model.pickle"
    assert code_of(load_model, source_of(folder)) == "model.bad-index"


def test_row_53_pickle_called_safetensors_is_refused(folder: Path, payload: bytes) -> None:
    """A pickle under a harmless name: its header is none."""
    (folder / "model.safetensors").write_bytes(payload)
    assert code_of(check_weights_exist, source_of(folder)) == "model.bad-safetensors"
    assert code_of(load_model, source_of(folder)) == "model.bad-safetensors"


def test_row_53_pickle_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model of pickles alone: refused before anything is downloaded."""
    names = ["config.json", "pytorch_model.bin"]
    monkeypatch.setattr(load_module, "list_files", lambda *_: names)
    source = ModelSource("org/old", "org/old")
    with pytest.raises(ModelError, match="safetensors revision") as caught:
        check_weights_exist(source)
    assert caught.value.code == "model.pickle"


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A sound adapter for the tiny model."""
    from peft import LoraConfig, get_peft_model

    base = load_model(source_of(tiny_model_folder))
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def chat(folder: Path) -> Any:
    return open_chat_model(str(folder), SilentReporter())


def test_row_53_pickle_in_an_adapter_is_refused(adapter: Path, payload: bytes) -> None:
    """An adapter whose weights are a pickle: refused; beside sound ones, it is not read."""
    (adapter / "adapter_model.bin").write_bytes(payload)
    assert chat(adapter).model.peft_config["default"].r == 2
    (adapter / "adapter_model.safetensors").unlink()
    assert code_of(chat, adapter) == "model.pickle"


def test_row_53_adapter_hidden_in_a_model_is_refused(folder: Path, payload: bytes) -> None:
    """A model with an adapter of pickles inside, which transformers would load with it."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    edit(folder / "adapter_config.json", base_model_name_or_path="x", **settings)
    (folder / "adapter_model.bin").write_bytes(payload)
    assert code_of(check_weights_exist, source_of(folder)) == "model.is-adapter"
    assert not hasattr(load_model(source_of(folder)), "peft_config")
    assert code_of(chat, folder) == "model.bad-adapter"


# Row 54: hostile settings

EVIL_CODE = "import pathlib\npathlib.Path({trace!r}).touch()\n" + "".join(
    f"class Evil{kind}:\n    pass\n" for kind in ("Config", "Model", "Tokenizer")
)
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture
def evil(folder: Path, trace: Path) -> Path:
    """A model with code beside it, which its settings name."""
    (folder / "evil.py").write_text(EVIL_CODE.format(trace=str(trace)))
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    edit(folder / "config.json", auto_map=AUTO_MAP)
    return folder


HOSTILE_KEYS: dict[str, Any] = {
    "_attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.EvilModel"}},
    "custom_generate": "evil/generate",
    "_commit_hash": "0" * 40,
    "configuration_files": ["config.4.0.0.json"],
    "transformers_weights": "../../x.safetensors",
    "name_or_path": "../../etc",
    "auto_map": AUTO_MAP,
}


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_row_54_hostile_key_is_dropped(folder: Path, key: str) -> None:
    """A key that names code, a kernel or another place, at two depths: as if it were not there."""
    value = {key: HOSTILE_KEYS[key]}
    edit(folder / "config.json", **value, extra=value)
    edit(folder / "generation_config.json", **value)
    edit(folder / "config.4.0.0.json", model_type="llama", hidden_size=64)
    config = load_config(source_of(folder))
    assert "evil" not in config.to_json_string(use_diff=False)
    assert key not in config.to_dict().get("extra", {})
    model = load_everything(folder)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.hidden_size == 32
    assert model.name_or_path == str(folder)


@pytest.mark.parametrize("key", ["to_dict", "get_text_config", "save_pretrained", "to_json_string"])
def test_row_54_key_with_a_methods_name_is_refused(folder: Path, key: str) -> None:
    """A key that would take the place of a method: refused."""
    edit(folder / "config.json", **{key: "x"})
    assert code_of(load_config, source_of(folder)) in ("model.bad-config", "model.no-config")
    assert code_of(load_model, source_of(folder)) in ("model.bad-config", "model.no-config")


@pytest.mark.parametrize(
    "change",
    [
        *({"model_type": kind} for kind in ("evil", "", None, 7, ["llama"], "__class__")),
        *({"architectures": names} for names in (["EvilForCausalLM"], "LlamaForCausalLM", [7])),
    ],
    ids=str,
)
def test_row_54_unknown_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    """A type or architecture that transformers does not know: refused with a clear error."""
    edit(folder / "config.json", **change)
    assert code_of(load_config, source_of(folder)) == "model.unknown-type"
    assert code_of(load_model, source_of(folder)) == "model.unknown-type"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"a":' * 50_000, b""])
def test_row_54_settings_that_are_none_are_refused(folder: Path, name: str, content: bytes) -> None:
    """Settings that are no JSON object: refused, whichever file it is."""
    (folder / name).write_bytes(content)
    assert code_of(load_tokenizer, source_of(folder)) == "model.bad-config"
    assert code_of(load_model, source_of(folder)) == "model.bad-config"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 1.5},
        {"rope_scaling": 7},
        {"rope_parameters": {"rope_type": "evil"}},
        {"hidden_act": "evil"},
        {"hidden_size": 64},
        {"vocab_size": 7},
    ],
    ids=str,
)
def test_row_54_settings_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any]) -> None:
    """Values of the wrong kind, or other than the weights': an error of ours, no traceback."""
    edit(folder / "config.json", **change)
    assert code_of(load_everything, folder) in (
        *("model.no-config", "model.unreadable", "model.bad-config", "model.no-tokenizer"),
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Trainer", "AutoModel", "pipeline", 7, []])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_row_54_tokenizer_class_that_is_none_is_refused(folder: Path, file: str, name: Any) -> None:
    """`tokenizer_class` with the name of something else in transformers: refused."""
    edit(folder / file, tokenizer_class=name)
    assert code_of(load_tokenizer, source_of(folder)) == "model.no-tokenizer"


def test_row_54_tokenizer_settings_cannot_call_or_read(folder: Path, trace: Path) -> None:
    """Constructor arguments and paths in tokenizer_config.json: ignored."""
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    paths = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), str(secret))
    edit(folder / "tokenizer_config.json", init_inputs=[str(secret)], _x=1, **paths)
    tokenizer = load_tokenizer(source_of(folder))
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == 259


@pytest.mark.parametrize(
    "change",
    [
        *({"model": value} for value in ({}, {"type": "Evil"}, 7)),
        *({"pre_tokenizer": value} for value in ({"type": "Sequence"}, {"type": "Evil"}, 7)),
        *({"added_tokens": value} for value in (7, [{"id": -1, "content": "x"}], [{}])),
        {"version": "99"},
    ],
    ids=str,
)
def test_row_54_broken_tokenizer_is_refused(folder: Path, change: dict[str, Any]) -> None:
    """A tokenizer.json of the wrong form: an error of ours, no traceback."""
    edit(folder / "tokenizer.json", **change)
    assert code_of(load_tokenizer, source_of(folder)) == "model.no-tokenizer"


@pytest.fixture
def megatron(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that PEFT would import, because an adapter names it."""
    (tmp_path / "evil_module.py").write_text(EVIL_CODE.format(trace=str(trace)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "evil_module"


def test_row_54_adapter_cannot_import(adapter: Path, megatron: str) -> None:
    """`megatron_core` and `auto_mapping` are names that PEFT imports: dropped."""
    mapping = {"base_model_class": "EvilModel", "parent_library": megatron}
    edit(
        adapter / "adapter_config.json",
        megatron_config={"a": 1},
        megatron_core=megatron,
        auto_mapping=mapping,
    )
    assert chat(adapter).model.peft_config["default"].megatron_config is None
    assert megatron not in sys.modules


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "evil/adapter"}}, "model.bad-adapter"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {}}, "model.bad-adapter"),
        ({"base_model_name_or_path": ["x"]}, "model.bad-adapter"),
        ({"base_model_name_or_path": "a\0b"}, "model.bad-adapter"),
        ({"base_model_name_or_path": "../../no-such"}, "model.missing"),
        ({"base_model_name_or_path": "/etc"}, "model.not-a-model"),
        ({"r": 1 << 40}, "model.bad-adapter"),
        ({"r": 3}, "model.bad-adapter"),
        ({"target_modules": ["nothing"]}, "model.bad-adapter"),
        ({"target_modules": "("}, "model.bad-adapter"),
        ({"lora_dropout": "x"}, "model.bad-adapter"),
    ],
    ids=str,
)
def test_row_54_hostile_adapter_is_refused(
    adapter: Path, change: dict[str, Any], code: str
) -> None:
    """Adapters that load other files, or do not fit: refused with a clear error."""
    edit(adapter / "adapter_config.json", **change)
    assert code_of(chat, adapter) == code


def test_row_54_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    """An adapter that names another as its base, or itself: refused, not followed."""
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert code_of(chat, adapter) == "model.is-adapter"


# Row 55: remote code


def test_row_55_remote_code_does_not_run(evil: Path) -> None:
    """Code beside a model of a known type: the model is loaded with transformers' own."""
    model = load_everything(evil)
    assert type(model).__module__.startswith("transformers.")
    assert not hasattr(model.config, "auto_map")


def test_row_55_model_that_needs_remote_code_is_refused(evil: Path) -> None:
    """Code beside a model of an unknown type: refused."""
    edit(evil / "config.json", model_type="evil", architectures=["EvilModel"])
    assert code_of(load_model, source_of(evil)) == "model.unknown-type"
    assert code_of(load_config, source_of(evil)) == "model.unknown-type"
    edit(evil / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    # Its tokenizer.json is data, which needs no code.
    assert load_tokenizer(source_of(evil)).eos_token == "<|im_end|>"


@pytest.mark.parametrize("key", ["trust_remote_code", "trust_code", "code_revision"])
def test_row_55_no_recipe_asks_for_remote_code(tiny_recipe: Any, key: str) -> None:
    """A recipe that wants it: there is no such key."""
    with pytest.raises(RecipeError, match="unknown-key"):
        load_recipe(tiny_recipe(), [f"model.{key}=true"])


def test_row_55_no_command_has_an_option_for_it() -> None:
    """No command offers to trust code."""
    for command in ("train", "check", "chat", "plan", "preview"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "trust" not in result.output.lower()


# Rows 56 and 57: chat templates

QUESTION = [{"role": "user", "content": "q"}]

PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__base__.__subclasses__()[140].__init__.__globals__['sys'] }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system(CMD) }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system(CMD) }}",
    "{{ cycler.__init__.__globals__.os.popen(CMD).read() }}",
    "{{ joiner.__init__.__globals__.os.popen(CMD).read() }}",
    "{{ namespace.__init__.__globals__.os.popen(CMD).read() }}",
    "{{ lipsum.__globals__['os'].popen(CMD).read() }}",
    "{{ lipsum | attr('__globals__') | attr('__getitem__')('os') }}",
    "{{ '' | attr('\\x5f\\x5fclass\\x5f\\x5f') | attr('\\x5f\\x5fmro\\x5f\\x5f') }}",
    "{{ ''[['__cl', 'ass__'] | join] }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ messages | groupby('__class__.__init__') }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{a.__init__.__globals__[os]}'.format_map({'a': cycler}) }}",
    "{{ ('{0.__globals__}' | attr('format'))(lipsum) }}",
    "{% set f = ['{0.__globals__}'] | map(attribute='format') | first %}{{ f(lipsum) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = cycler %}{{ ns.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__['__builtins__'] }}",
    "{% for m in messages %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "{% set g = messages | map('upper') %}{{ g.gi_frame.f_builtins }}",
    "{{ raise_exception.__wrapped__.__code__.co_consts }}",
    "{% import 'os' as os %}{{ os.system(CMD) }}",
    "{% from 'subprocess' import run %}{{ run(CMD) }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ get_flashed_messages.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ dict.__base__.__subclasses__() }}{{ dict.mro() }}",
    "{{ range.__call__.__self__ }}{{ range.__globals__ }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ (undefined_name | attr('_undefined_exception')).__traceback__.tb_frame }}",
]


@pytest.mark.parametrize("payload_source", PAYLOADS)
def test_row_56_template_escape_is_blocked(payload_source: str, trace: Path) -> None:
    """The known ways out of Jinja: an error, or the empty text of what is not there."""
    source = payload_source.replace("CMD", f"'touch {trace}'")
    messages = json.loads(json.dumps(QUESTION))
    try:
        text = compile_template(source).render(messages)
    except (jinja2.TemplateError, TypeError):
        text = ""
    assert text == ""
    assert messages == QUESTION


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999)"
    " %}{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "string multiplication": "{{ 'x' * 10 ** 10 }}",
    "multiplication in steps": "{% set ns = namespace(x='x' * 1000) %}{% for i in range(9) %}"
    "{% set ns.x = ns.x * 1000 %}{% endfor %}{{ ns.x | length }}",
    "list multiplication": "{{ ([0] * 10 ** 9) | length }}",
    "tuple multiplication": "{{ ((0, 1) * 10 ** 9) | length }}",
    "huge range": "{{ range(10 ** 12) | list | length }}",
    "huge range, summed": "{{ range(10 ** 9) | sum }}",
    "macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubling with ~": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "list of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "replace": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aa').replace('b', 'bb') %}{% endfor %}{{ ns.x | length }}",
    "replace of nothing": "{{ ('x' * 100000) | replace('', 'y' * 100000) | length }}",
    "join": "{{ range(99999) | join('x' * 100000) | length }}",
    "join of a method": "{{ ('x' * 100000).join(['y'] * 100000) | length }}",
    "center": "{{ 'x' | center(10 ** 10) | length }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) | length }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format method": "{{ '{:10000000000}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power tower": "{{ (9 ** 9) ** (9 ** 9) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) | length }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) | length }}",
    "json": "{{ ([[1] * 1000] * 1000) | tojson(indent=60) | length }}",
    "wordwrap": "{{ ('x' * 1000000) | wordwrap(1) | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "lipsum": "{{ lipsum(n=10 ** 6) }}",
    "round": "{{ 1.5 | round(10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "filter block": "{% filter replace('x', 'x' * 1000000) %}" + "x" * 1000 + "{% endfilter %}",
    "set block": "{% set a %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "search": "{{ ('a' * 1000000).rfind('a' * 500000 + 'b') }}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_row_57_template_bomb_is_stopped(name: str) -> None:
    """Templates that make much of little: over soon after the limit of time, and 4 MiB at most."""
    limits = Limits(seconds=0.1)
    begun = time.thread_time()
    try:
        text = compile_template(BOMBS[name], limits).render(QUESTION)
    except (jinja2.TemplateError, OverflowError) as error:
        text = str(error)
    # The last step before a look at the clock may add to it.
    assert time.thread_time() - begun < 0.6
    assert len(text) <= 4 << 20


def test_row_57_limits_when_nobody_names_any() -> None:
    """What a template may take by default: less than a second of processor time, 4 MiB of text."""
    begun = time.thread_time()
    with pytest.raises(TemplateLimitError, match="processor time"):
        compile_template(BOMBS["nested loops"]).render(QUESTION)
    assert time.thread_time() - begun < 1
    assert Limits().output_characters == 4 << 20


def test_row_57_bombs_take_little_memory() -> None:
    """The bombs together: no more than 200 MB above what there was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, source in BOMBS.items():
        if "loop" in name or name in ("cycler", "macro that calls itself twice"):
            continue  # these take time alone
        try:
            compile_template(source).render(QUESTION)
        except (jinja2.TemplateError, OverflowError):
            continue
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


# Row 58: archives


def zip_of(*entries: tuple[str, bytes], mode: int = 0) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, mode << 16
            packed.writestr(info, content)
    return target.getvalue()


def tar_of(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as packed:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, link
        packed.addfile(member, io.BytesIO(content))
    return target.getvalue()


ZEROS = bytes(8 << 20)
CRAFTED = {
    "zip, up": zip_of(("../evil", b"x")),
    "zip, absolute": zip_of(("/tmp/evil", b"x")),
    "zip, backslashes": zip_of(("..\\evil", b"x")),
    "zip, link": zip_of(("link", b"/tmp"), mode=0o120777),
    "zip, device": zip_of(("disk", b""), mode=0o060666),
    "zip, bomb": zip_of(("zeros", ZEROS)),
    "zip, many bombs": zip_of(*((f"{i}", bytes(1 << 20)) for i in range(9))),
    "zip, many entries": zip_of(*((f"{i}", b"") for i in range(10_001))),
    "tar, up": tar_of("../evil", b"x"),
    "tar, absolute": tar_of("/tmp/evil", b"x"),
    "tar, link": tar_of("link", kind=tarfile.SYMTYPE, link="/tmp"),
    "tar, hard link": tar_of("link", kind=tarfile.LNKTYPE, link="../secret"),
    "tar, device": tar_of("disk", kind=tarfile.CHRTYPE),
    "tar, pipe": tar_of("pipe", kind=tarfile.FIFOTYPE),
    "tar.gz, up": gzip.compress(tar_of("a/../../evil", b"x")),
    "tar.gz, bomb": gzip.compress(tar_of("zeros", ZEROS)),
    "tar.gz, bomb of padding": gzip.compress(tar_of("a", b"x") + ZEROS * 4),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_row_58_crafted_archive_is_refused(name: str, tmp_path: Path) -> None:
    """Traversal, links, devices, bombs: refused, and nothing is left, inside or outside."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "secret").write_text("s")
    (place / "upload").write_bytes(CRAFTED[name])
    call = unpack, place / "upload", place / "out"
    if name == "tar.gz, bomb of padding":
        unpack(call[1], call[2], limit_bytes=1 << 30)  # what is behind the end is not unpacked
        assert [file.name for file in (place / "out").iterdir()] == ["a"]
        return
    with pytest.raises(UserError, match=r"archive\.(name|link|too-large)"):
        unpack(call[1], call[2], limit_bytes=1 << 30)
    assert [file.name for file in place.iterdir()] == ["upload"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["place", "secret"]
    assert not Path("/tmp/evil").exists()


# Row 60: path tricks (tests/io/test_paths.py has the table of names)


def test_row_60_path_tricks_are_refused(tmp_path: Path) -> None:
    """A name that leads out of its folder, also by a link or into a sibling: refused."""
    root = tmp_path / "runs"
    root.mkdir()
    (tmp_path / "runs-of-others").mkdir()
    (root / "link").symlink_to(tmp_path / "runs-of-others")
    tricks = ("../runs-of-others/x", "link/x", "/etc/passwd", "C:\\x", "a/../../x", "x\0.json", "")
    for name in tricks:
        assert code_of(resolve_inside, root, name).startswith("path.")
    assert resolve_inside(root, "mine/x") == root.resolve() / "mine" / "x"


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.safetensors", "a\\x.safetensors"])
def test_row_60_path_in_an_index_is_refused(folder: Path, name: str) -> None:
    """An index of weights that names a file elsewhere: refused."""
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(load_model, source_of(folder)) == "model.bad-index"


# Row 66: headers that lie


def mutate(content: bytes, head_bytes: int, dice: random.Random) -> bytes:
    """Up to four changes in the header: bits, bytes, numbers, pieces lost, doubled or cut off."""
    result = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(head_bytes, len(result)) or 1)
        kind = dice.randrange(6)
        if kind == 0:
            result[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            result[at] = dice.choice(b'0123456789[]{},:"-eE\\ \xff\x00')
        elif kind == 2:
            number = dice.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(content)])
            result[at : at + 8] = struct.pack("<Q", number)
        elif kind == 3:
            del result[at : at + dice.randint(1, 20)]
        elif kind == 4:
            result[at:at] = result[at : at + dice.randint(1, 20)]
        else:
            del result[max(1, dice.randrange(len(result))) :]
    return bytes(result)


def read_tensors(file: Path) -> dict[str, bytes]:
    with safe_open(file, "np") as stored:
        return {name: stored.get_tensor(name).tobytes() for name in stored.keys()}  # noqa: SIM118


class bounded_memory:
    """At most so many more bytes of address space than now, as `ulimit -v`."""

    def __init__(self, more_bytes: int) -> None:
        self._more_bytes = more_bytes

    def __enter__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + self._more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, self._before[1]))

    def __exit__(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


def fuzz_safetensors(folder: Path, count: int) -> None:
    original = (folder / "model.safetensors").read_bytes()
    expected = read_tensors(folder / "model.safetensors")
    head_bytes = 8 + int.from_bytes(original[:8], "little")
    dice, file, passed = random.Random(66), folder / "mutated.safetensors", 0
    with bounded_memory(100 << 20):
        for _ in range(count):
            file.write_bytes(mutate(original, head_bytes, dice))
            try:
                check_safetensors(file)
                tensors = read_tensors(file)
            except (ModelError, SafetensorError):
                continue
            # A changed name or type is another model, but never bytes of somewhere else.
            assert sum(map(len, tensors.values())) == sum(map(len, expected.values()))
            passed += 1
    assert passed < count / 2


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by /proc and RLIMIT_AS")
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_row_66_lying_safetensors_header(folder: Path, count: int) -> None:
    """Changed headers in 100 MB of memory: refused, or the same bytes under other names."""
    fuzz_safetensors(folder, count)


def small_gguf(folder: Path) -> Path:
    import gguf
    import numpy as np

    file = folder / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by /proc and RLIMIT_AS")
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_row_66_lying_gguf_header(tmp_path: Path, count: int) -> None:
    """Changed headers in 100 MB of memory: refused, or read without surprise by the reader."""
    import gguf

    original = small_gguf(tmp_path).read_bytes()
    check_gguf(tmp_path / "small.gguf")
    dice, file = random.Random(66), tmp_path / "mutated.gguf"
    passed = 0
    with bounded_memory(100 << 20):
        for _ in range(count):
            file.write_bytes(mutate(original, len(original) - 448, dice))
            try:
                check_gguf(file)
            except ModelError:
                continue
            passed += 1
            try:
                tensors = gguf.GGUFReader(file).tensors
            except (ValueError, KeyError, IndexError):
                continue  # e.g. bytes in a text that are no UTF-8
            assert sum(int(tensor.n_bytes) for tensor in tensors) <= len(original)
    assert passed < count / 2


def test_row_66_lying_file_is_refused_by_the_loader(folder: Path) -> None:
    """A header of a terabyte, and a GGUF file of 2^60 tensors: refused before they are opened."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert code_of(check_weights_exist, source_of(folder)) == "model.bad-safetensors"
    assert code_of(load_model, source_of(folder)) == "model.bad-safetensors"
    lying = folder / "x.gguf"
    lying.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    assert code_of(convert_gguf, lying, SilentReporter()) == "model.bad-gguf"


def test_row_66_gguf_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """A GGUF file in order that has no model in it: an error of ours, no traceback."""
    assert code_of(convert_gguf, small_gguf(tmp_path), SilentReporter()) == "model.bad-gguf"

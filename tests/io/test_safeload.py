"""Views of model folders show what may be loaded and nothing else; no source file can run text."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith.errors import ModelError
from tunesmith.io.safeload import (
    adapter_settings,
    adapter_view,
    model_view,
    read_settings,
    refuse_pickles,
    shard_names,
    weight_files,
    without_code,
)

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tunesmith"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = {"init_inputs": [1], "auto_map": ["evil.T", None], "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("x")
    for name in ("evil.py", "pytorch_model.bin", "adapter_config.json", "adapter_model.bin"):
        (folder / name).write_bytes(b"evil")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("y")
    return folder


def names_in(view: Path) -> set[str]:
    return {str(file.relative_to(view)) for file in view.rglob("*") if file.is_file()}


def code_of(call: Any, *args: Any, **how: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **how)
    return caught.value.code


def open_view(folder: Path) -> None:
    with model_view(folder, "m", with_weights=True):
        pass


SETTINGS = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "additional_chat_templates/tools.jinja",
}


def test_a_view_shows_weights_and_settings_alone(folder: Path) -> None:
    with model_view(folder, "m", with_weights=False) as view:
        assert names_in(view) == SETTINGS
        assert read_settings(view / "config.json") == {"model_type": "llama", "hidden_size": 8}
        assert read_settings(view / "tokenizer_config.json") == {"eos_token": "</s>"}
    with model_view(folder, "m", with_weights=True) as view:
        assert names_in(view) == {*SETTINGS, "model.safetensors"}
        content = (view / "model.safetensors").read_bytes()
    assert content == (folder / "model.safetensors").read_bytes()
    assert not view.exists()
    assert "auto_map" in read_settings(folder / "config.json")  # the user's file stays as it is


def test_a_view_of_a_hub_cache_follows_its_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.glob("*.*"):
        (snapshot / file.name).symlink_to(Path("../../model") / file.name)
    with model_view(snapshot, "m", with_weights=True) as view:
        assert (view / "model.safetensors").stat().st_size > 8
        assert (view / "tokenizer.json").read_text() == "{}"


def test_shards_come_with_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "other.safetensors").write_bytes(b"not of the model")
    index = {"metadata": {}, "weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with model_view(folder, "m", with_weights=True) as view:
        shards = {"model-1.safetensors", "model.safetensors.index.json"}
        assert names_in(view) == SETTINGS | shards


@pytest.mark.parametrize(
    "name",
    [
        *("../other.safetensors", "/etc/x.safetensors", "a/b.safetensors", "pytorch_model.bin"),
        *("a\\b.safetensors", "a\0.safetensors", "", 7, None, ["x.safetensors"][0] + ".bin"),
    ],
)
def test_an_index_names_files_beside_it_alone(folder: Path, name: Any) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert code_of(shard_names, index) == "model.bad-index"
    assert code_of(open_view, folder) == "model.bad-index"


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_files(tmp_path: Path, content: Any) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps(content))
    assert code_of(shard_names, index) == "model.bad-index"


def test_a_shard_that_is_missing_or_damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert code_of(open_view, folder) == "model.bad-safetensors"
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(open_view, folder) == "model.bad-safetensors"


def test_weights_of_other_names_and_none_at_all(folder: Path, tmp_path: Path) -> None:
    renamed = (folder / "model.safetensors").rename(folder / "trained.safetensors")
    assert weight_files(folder, "m") == [renamed]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert code_of(weight_files, empty, "m") == "model.not-a-model"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
def test_pickles_alone_are_refused(folder: Path, suffix: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").rename(folder / f"weights{suffix}")
    assert code_of(open_view, folder) == "model.pickle"
    assert code_of(refuse_pickles, [f"model-00001-of-00002{suffix}"], "m") == "model.pickle"
    refuse_pickles([f"training_args{suffix}", "model.safetensors"], "m")
    refuse_pickles(["README.md"], "m")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'"x"', b"{", b"\xff\xfe{}", b'{"a":' * 100_000, b"[" * 100_000, b"{1: 2}"],
    ids=lambda content: ascii(content[:8]),
)
def test_settings_that_are_no_json_object(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    assert code_of(read_settings, file) == "model.bad-config"


def test_settings_that_are_not_there_or_endless(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert code_of(read_settings, file) == "model.bad-config"
    with file.open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    assert code_of(read_settings, file) == "model.bad-config"


def test_keys_that_name_code_go_at_any_depth() -> None:
    evil = {
        **dict.fromkeys(("auto_map", "trust_remote_code", "custom_pipelines"), "evil"),
        **dict.fromkeys(("_attn_implementation_internal", "_attn_implementation"), "evil/k"),
        **dict.fromkeys(("attn_implementation", "transformers_weights", "_commit_hash"), "evil"),
    }
    plain = {"hidden_size": 8, "rope_scaling": {"type": "linear"}, "eos_token_id": [1, 2]}
    nested = {**plain, **evil, "text_config": {**plain, **evil, "layers": [{**plain, **evil}]}}
    assert without_code(nested) == {**plain, "text_config": {**plain, "layers": [plain]}}
    gemma = {"_sliding_window_pattern": 6}
    assert without_code(gemma) == gemma


# Adapters

ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "base_model_name_or_path": "org/base",
    "revision": None,
    "target_modules": ["q_proj"],
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"w": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    write_adapter(folder)
    return folder


def write_adapter(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}))


def test_a_view_of_an_adapter(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"evil")
    evil = dict.fromkeys(("auto_mapping", "megatron_config", "megatron_core"), "evil")
    write_adapter(adapter, **evil, corda_config={"cache_file": "evil.pt"}, rank_pattern={"q": 4})
    with adapter_view(adapter, "a") as view:
        assert names_in(view) == {"adapter_config.json", "adapter_model.safetensors"}
        assert read_settings(view / "adapter_config.json") == {**ADAPTER, "rank_pattern": {"q": 4}}


@pytest.mark.parametrize(
    "change",
    [
        *({"peft_type": kind} for kind in ("XLORA", "CPT", "ADAPTION_PROMPT", None, ["LORA"])),
        *({"peft_type": "PROMPT_TUNING", "token_dim": n} for n in (None, 0, 1 << 40, "8", True)),
        *({"peft_type": kind, "r": 1 << 40} for kind in ("VERA", "OFT", "LOHA")),
        {"peft_type": "VBLORA", "num_vectors": 1 << 40},
        *({"base_model_name_or_path": b} for b in (None, "", 7, "a\0b", "a\nb", ["x"])),
        *({"revision": r} for r in (7, "a\0", ["main"])),
        *({"r": r} for r in (0, -1, 1 << 40, "8", True, None, 8.0)),
        *({"rank_pattern": p} for p in ({"q": 1 << 40}, {"q": None}, ["q"])),
    ],
    ids=str,
)
def test_adapters_that_want_more_than_weights(adapter: Path, change: dict[str, Any]) -> None:
    write_adapter(adapter, **change)
    assert code_of(adapter_settings, adapter, "a") == "model.bad-adapter"


PROMPT: dict[str, Any] = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 3,
    "token_dim": 4,
    "base_model_name_or_path": "org/base",
}


def test_virtual_tokens_load_no_tokenizer(adapter: Path) -> None:
    values = np.ones((3, 4), np.float32)
    save_file({"prompt_embeddings": values}, adapter / "adapter_model.safetensors")
    evil = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": "evil/code",
        "tokenizer_kwargs": {"trust_remote_code": True},
        "prompt_tuning_init_state_dict_path": "evil.pt",
        "inference_mode": False,
    }
    (adapter / "adapter_config.json").write_text(json.dumps({**PROMPT, **evil}))
    with adapter_view(adapter, "a") as view:
        found = read_settings(view / "adapter_config.json")
    assert found == {**PROMPT, "inference_mode": True, "num_transformer_submodules": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"num_virtual_tokens": 1 << 19},
        {"token_dim": 1 << 19},
        {"peft_type": "PREFIX_TUNING", "num_layers": 1 << 19},
        {"peft_type": "PREFIX_TUNING"},
    ],
    ids=str,
)
def test_virtual_tokens_that_ask_for_more_memory_than_the_file(
    adapter: Path, change: dict[str, Any]
) -> None:
    values = np.ones((3, 4), np.float32)
    save_file({"prompt_embeddings": values}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**PROMPT, **change}))

    def open_adapter() -> None:
        with adapter_view(adapter, "a"):
            pass

    assert code_of(open_adapter) == "model.bad-adapter"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IA3", {}),
        ("OFT", {"r": 0, "oft_block_size": 8}),
        ("VERA", {"r": 256, "save_projection": True}),
    ],
)
def test_other_kinds_keep_their_settings(
    adapter: Path, kind: str, settings: dict[str, Any]
) -> None:
    values = {"peft_type": kind, "base_model_name_or_path": "org/base", **settings}
    (adapter / "adapter_config.json").write_text(json.dumps({**values, "auto_mapping": "evil"}))
    assert adapter_settings(adapter, "a") == values


def test_an_adapter_without_sound_weights(adapter: Path) -> None:
    def open_adapter() -> None:
        with adapter_view(adapter, "a"):
            pass

    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 50)
    assert code_of(open_adapter) == "model.bad-safetensors"
    (adapter / "adapter_model.safetensors").unlink()
    assert code_of(open_adapter) == "model.bad-adapter"
    (adapter / "adapter_model.bin").write_bytes(b"evil")
    assert code_of(open_adapter) == "model.pickle"


# The source

RUNS_TEXT = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.hub.load"),
    *("marshal.load", "marshal.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load"),
    *("yaml.full_load", "runpy.run_path", "numpy.load", "np.load", "shutil.unpack_archive"),
    *("subprocess.getoutput", "code.interact"),
}
MODULES = {
    "pickle",
    "cPickle",
    "joblib",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "imp",
    "runpy",
}
BAD_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True}
UNPACKERS = {"extractall", "extract"}

NUMPY_REASON = "maps our own token store; numpy unpickles only with allow_pickle=True"
OWN_FILES_REASON = "loads what this process has just written, by its target's loader; no code"
ALLOWED = {
    "data/build.py:np.load": NUMPY_REASON,
    "data/store.py:np.load": NUMPY_REASON,
    "reference_pass.py:np.load": "reads its own parts, behind their manifest; the same",
    "export/gguf_reload.py:np.load": "of a child that it has started itself; without pickles",
    "export/gguf_reload.py:AutoModelForCausalLM.from_pretrained": OWN_FILES_REASON,
    "export/quantized.py:AutoModelForCausalLM.from_pretrained": OWN_FILES_REASON,
}
"""`file:name` of a call that is fine all the same, with the reason."""

LOADERS = {"model/load.py", "model/gguf.py", "model/load_adapter.py"}
"""Where `from_pretrained` may be called: through views."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(file: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.partition(".")[0] in MODULES else []
            found += [n for a in node.names if (n := f"{module}.{a.name}") in RUNS_TEXT]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            is_loader = file.relative_to(SOURCE).as_posix() in LOADERS
            if (
                name in RUNS_TEXT
                or last in UNPACKERS
                or (last == "from_pretrained" and not is_loader)
            ):
                found.append(name)
            for argument in node.keywords:
                value = argument.value
                bad = BAD_ARGUMENTS.get(argument.arg or "")
                if bad is not None and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    found.append(f"{argument.arg}=")
    return found


FILES = sorted(SOURCE.rglob("*.py"))


def test_no_source_file_unpickles_or_runs_text() -> None:
    found = [f"{file.relative_to(SOURCE).as_posix()}:{o}" for file in FILES for o in offences(file)]
    assert sorted(set(found) - set(ALLOWED)) == []
    assert set(ALLOWED) <= set(found), "an entry that is not needed any more"


def test_the_source_test_sees_what_it_should(tmp_path: Path, monkeypatch: Any) -> None:
    lines = {
        "import pickle": "pickle",
        "from joblib import load": "joblib",
        "from torch import load": "torch.load",
        "torch.load(x)": "torch.load",
        "eval(x)": "eval",
        "yaml.load(x, yaml.SafeLoader)": "yaml.load",
        "subprocess.run(x, shell=True)": "shell=",
        "subprocess.run(x, shell=flag)": "shell=",
        "tar.extractall(x)": "tar.extractall",
        "AutoModel.from_pretrained(x)": "AutoModel.from_pretrained",
    }
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    for line, offence in lines.items():
        (tmp_path / "x.py").write_text(line)
        assert offences(tmp_path / "x.py") == [offence]
    (tmp_path / "x.py").write_text(
        "model.eval(); re.compile('x'); yaml.safe_load(x); f(shell=False)"
    )
    assert offences(tmp_path / "x.py") == []

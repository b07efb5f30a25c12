"""What is a secret is masked wherever it stands; ordinary text is left as it is."""

from __future__ import annotations

import html
import json
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tunesmith.io.redact import redact, redact_tree, redacted_traceback, restore_tree

# Joined at run time, so that no scanner takes this file for a leak.
RANDOM = "a1B2c3D4" + "e5F6g7H8i9J0"
WORD = "correcthorse" + "battery"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "aws_secret_access_key",
        "DB_PASSWORD",
        "PGPASSWD",
        "MY_CREDENTIALS",
    ],
)
def test_values_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "p@ss w/ör\"d\\'<1>"
    monkeypatch.setenv(name, secret)
    spellings = [
        secret,
        f"x{secret}y{secret}",
        json.dumps({"key": secret}),
        json.dumps({"key": secret}, ensure_ascii=False),
        f"https://host/{quote(secret, safe='')}",
        repr([secret]),
        html.escape(secret),
    ]
    for text in spellings:
        masked = redact(text)
        assert "***" in masked, text
        assert not any(piece in masked for piece in ("p@ss", "ör", "p%40ss", "<1>", "1&gt;")), text
        assert redact(masked) == masked


def test_a_changed_environment_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"said {WORD}."
    assert redact(text) == text
    monkeypatch.setenv("SOME_SECRET", WORD)
    assert redact(text) == "said ***."
    monkeypatch.delenv("SOME_SECRET")
    assert redact(text) == text


def test_a_key_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-----BEGIN " + f"PRIVATE KEY-----\n{RANDOM * 2}\n{RANDOM[::-1] * 2}\n-----END"
    monkeypatch.setenv("DEPLOY_KEY", key)
    for text in (key, json.dumps(key), f"line two is {RANDOM[::-1] * 2}"):
        assert RANDOM not in redact(text)
        assert RANDOM[::-1] not in redact(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),
        ("SOME_TOKEN", "disabled"),
        ("SOME_PASSWORD", "xxxxxxxxxxxx"),
        ("MAX_TOKENS", "16384000"),
        ("HF_TOKEN_PATH", "/tmp/some/place"),
        ("SSL_KEY_FILE", "~/keys/server.pem"),
        ("TOKENIZERS_PARALLELISM", "parallelism"),
        ("HOME", "ordinaryvalue"),
    ],
)
def test_values_that_are_no_secrets(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}.") == f"it is {value}."


def test_a_word_as_a_password_counts_only_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "trainers")
    assert redact("trainers/x, restrainers, trainers_2") == "***/x, restrainers, ***_2"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pass@host/x.json", "https://***@host/x.json"),
        ("https:/user:pass@host/x.json", "https:/***@host/x.json"),  # as pathlib writes it
        ("postgresql+psycopg://me:p@ss:w@db:5432/x", "postgresql+psycopg://***@db:5432/x"),
        ("http://token@proxy:8080", "http://***@proxy:8080"),
        ("在https://u:p@h/数据", "在https://***@h/数据"),
        ("https://h/x?token=abc&rows=5", "https://h/x?token=***&rows=5"),
        ("https://h/x?rows=5&access_token=a%2Fb#top", "https://h/x?rows=5&access_token=***#top"),
        ("'https://h/x?api_key=abc'", "'https://h/x?api_key=***'"),
        ("https://h/?X-Amz-Signature=0f&sig=1&Signature=2", "https://h/?X-Amz-Signature=***&sig=***&Signature=***"),
        (f"Authorization: Bearer {WORD}", "Authorization: Bearer ***"),
        (f"{{'authorization': 'Basic {WORD}'}}", "{'authorization': 'Basic ***'}"),
        (f"('Authorization', b'{RANDOM}')", "('Authorization', b'***')"),
        (f"X-Api-Key: {RANDOM}", "X-Api-Key: ***"),
        (f"curl -H 'PRIVATE-TOKEN: {RANDOM}'", "curl -H 'PRIVATE-TOKEN: ***'"),
        (f"sent Bearer {RANDOM}.{RANDOM}", "sent Bearer ***"),
        (f"export WANDB_API_KEY={RANDOM}", "export WANDB_API_KEY=***"),
        (f'{{"access_token": "{RANDOM}"}}', '{"access_token": "***"}'),
        (f"host=db password={RANDOM} user=me", "host=db password=*** user=me"),
        (f"Cookie: m_session_id={RANDOM}", "Cookie: m_session_id=***"),
    ],
)  # fmt: skip
def test_places_that_tell_a_secret(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert redact(masked) == masked


@pytest.mark.parametrize(
    "key",
    [
        "hf" + "_" + (RANDOM * 2)[:34],
        "sk-" + RANDOM * 2,
        "sk-proj-" + RANDOM + "_" + RANDOM,
        "gh" + "p_" + (RANDOM * 2)[:36],
        "gh" + "o_" + (RANDOM * 2)[:36],
        "github" + "_pat_" + RANDOM * 3,
        "AK" + "IA" + "IOSFODNN7ZBCDEFG",
        "xo" + "xb-1234567890-" + RANDOM,
        "ms" + "-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f",
        f"eyJ{RANDOM}.eyJ{RANDOM}.{RANDOM}",
    ],
)
def test_keys_of_well_known_shapes(key: str) -> None:
    for text in (key, f"钥匙是{key}，谢谢", f"train data.name={key} x=1", f'"{key}"'):
        assert redact(text) == text.replace(key, "***")


@pytest.mark.parametrize("is_cut", [False, True])
def test_private_keys(is_cut: bool) -> None:
    head, end = "-----BEGIN RSA " + "PRIVATE KEY-----", "-----END RSA " + "PRIVATE KEY-----"
    text = f"{head}\n{RANDOM}\n{RANDOM}\n" + ("" if is_cut else f"{end} behind it")
    assert redact(text) == f"{head}***" + ("" if is_cut else f"{end} behind it")


HARMLESS = [
    "",
    "max_tokens=5",
    "max_tokens=16384 and ?max_tokens=16384&tokens=12345678",
    "the tokenizer of Qwen/Qwen3-0.6B has 151,669 tokens; eos_token='<|im_end|>'",
    "tokenizer_config.json, special_tokens_map.json, tokenizer.json",
    "pad_token: <|endoftext_2024|>, pad_token_id: 151643",
    "如何写好一份项目总结报告？请给出三个要点，每个不超过20字。密码学是研究……",
    "访问https://example.com，联系me@example.org",
    "git@github.com:org/name.git and ssh://git@github.com/org/name2",
    "write to me@example.com or look at https://example.com/@scope/package1",
    "http://localhost:4873/@scope/package",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "/root/.cache/tunesmith/stores/0f1e2d3c4b5a6978-0123456789abcdef/ids.npy",
    "runs/alpaca_en_demo/checkpoints/step-000120/MANIFEST.json",
    "C:\\Users\\me\\data.jsonl",
    "hf_hub_download and hf_xet and hf:org/name@main:train",
    "sk-learn, task-a1B2c3D4e5F6g7H8i9J0a1B2, sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "the bearer of this letter; a Bearer token is missing; WWW-Authenticate: Bearer realm",
    "Authorization: required",
    "password: must have 8 characters",
    "api_key=None, api_key=os.environ['X'], api_key=settings.api_key",
    "key=value key.path=value sort(key=len) train.learning_rate=1e-4",
    "no `train.learning_rat`; did you mean `learning_rate`? see https://h/x?page=2&size=20",
    '{"event": "step", "step": 7, "time": 1763740800.123, "loss": 2.345678, "tokens": 12345678}',
    "2024-01-02T10:20:30.123456+08:00",
    "*** **** ***@***",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_left_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", RANDOM[::-1])
    assert redact(text) == text


PIECES = st.sampled_from(
    [
        *("https://", ":/", "@", "?token=", "&sig=", "Bearer ", "Authorization: ", "password="),
        *("***", " ", '"', "用户", "sk-", "eyJ", RANDOM, "hf" + "_" + RANDOM * 2),
        "-----BEGIN " + "PRIVATE KEY-----",
    ]
)


@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
@example("")
def test_masking_twice_is_masking_once(text: str) -> None:
    masked = redact(text)
    assert redact(masked) == masked


def test_trees_and_back() -> None:
    tree: dict[str, Any] = {
        "data": {"train": [{"path": "https://u:p@h/x.json", "weight": 1.5}, {"path": "b"}]},
        "name": None,
        "tags": {"ordinary": "text"},
    }
    masked = redact_tree(tree)
    assert masked["data"]["train"][0] == {"path": "https://***@h/x.json", "weight": 1.5}
    read_back = yaml.safe_load(yaml.safe_dump(masked))
    assert restore_tree(read_back, tree) == tree
    other = {**tree, "data": {"train": [{"path": "https://u:p@other/x.json"}, {"path": "b"}]}}
    assert restore_tree(read_back, other) == masked  # a real change is still seen
    assert restore_tree(read_back, {"data": "x"}) == masked
    assert restore_tree(["https://***@h"], ["https://u:p@h", 1]) == ["https://***@h"]


def test_traceback_with_its_causes() -> None:
    def ask(address: str) -> None:
        try:
            raise OSError(f"no answer from {address}")
        except OSError as error:
            raise ValueError("no data") from error

    with pytest.raises(ValueError, match="no data") as raised:
        ask(f"https://me:{RANDOM}@host")
    text = redacted_traceback(raised.value)
    assert "no answer from https://***@host" in text
    assert text.rstrip().endswith("ValueError: no data")
    assert RANDOM not in text

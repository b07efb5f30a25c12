"""Secrets do not leave: what is written or shown goes through `redact` first.

Masked are values of environment variables whose names speak of a secret, credentials in addresses,
headers that carry a token, assignments of passwords and keys, and keys of well-known shapes. Not
caught: a secret that stands in no environment variable, has no shape of its own, and is not
introduced by its name; one that is split over lines; names of things, however private.
"""

from __future__ import annotations

import html
import json
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, TypeVar, cast
from urllib.parse import quote

Tree = TypeVar("Tree")

MASK: Final = "***"
MIN_VALUE_CHARACTERS: Final = 8
"""Shorter values of variables stand in too many ordinary texts."""

_KEY_SHAPES: Final = (
    r"sk-(?:proj-|ant-|or-v1-)?[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic and many who copy them
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # Amazon
    r"LTAI[A-Za-z0-9]{12,26}",  # Alibaba Cloud
    r"AKID[A-Za-z0-9]{32}",  # Tencent Cloud
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}",
    r"glpat-[A-Za-z0-9_-]{20,}",
    r"hf_[A-Za-z0-9]{30,}",
    r"ms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",  # ModelScope
    r"xox[abprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # JSON web token
)
API_KEY: Final = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_KEY_SHAPES)})(?![A-Za-z0-9])")
"""Keys whose shape alone tells what they are."""

_KEY_TRACES: Final = (
    *("sk-", "AKIA", "ASIA", "LTAI", "AKID", "AIza", "github_pat_", "glpat-", "hf_", "ms-", "xox"),
    *("eyJ", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
)


def may_hold_key(text: str) -> bool:
    """Whether it is worth while to look for an API_KEY: ten times faster than to look."""
    return any(trace in text for trace in _KEY_TRACES)


def is_random(key: str) -> bool:
    """Whether a text of a key's shape is one: not sk-xxxxxxxx, not sk-learn-like-estimator-base."""
    return len(set(key)) > 8 and any(sign.isdigit() for sign in key)


def redact(text: str) -> str:
    """The text with MASK in place of every secret; ordinary text comes back as it is."""
    return _redact(text, _secrets_of(_environment()))


def redact_tree(tree: Tree) -> Tree:
    """A copy of nested mappings and lists in which every text, keys included, is redacted."""
    return cast("Tree", _redact_tree(tree, _secrets_of(_environment())))


def _redact(text: str, secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(MASK, text)
    if may_hold_key(text):
        text = API_KEY.sub(lambda match: MASK if is_random(match[0]) else match[0], text)
    lower = text.lower()
    for traces, pattern, masked in _PLACES:
        if any(trace in lower for trace in traces):
            text = pattern.sub(masked, text)
    return text


def _redact_tree(tree: object, secrets: re.Pattern[str] | None) -> object:
    if isinstance(tree, str):
        return _redact(tree, secrets)
    if isinstance(tree, Mapping):
        items = cast("Mapping[object, object]", tree).items()
        return {_redact_tree(key, secrets): _redact_tree(each, secrets) for key, each in items}
    if isinstance(tree, list | tuple):
        return [_redact_tree(each, secrets) for each in cast("Iterable[object]", tree)]
    return tree


def restore_tree(masked: Tree, known: object) -> Tree:
    """Puts secrets back that `redact_tree` took out, where `known` has them at the same place.

    A recipe that was written down without its secrets is compared and gone on with like this.

    Args:
        masked: what was read back.
        known: a tree that may be the original.
    """
    if isinstance(masked, str):
        is_same = isinstance(known, str) and MASK in masked and redact(known) == masked
        return cast("Tree", known) if is_same else masked
    if isinstance(masked, dict):
        others = cast("dict[object, object]", known) if isinstance(known, dict) else {}
        items = cast("dict[object, object]", masked).items()
        return cast("Tree", {key: restore_tree(each, others.get(key)) for key, each in items})
    if isinstance(masked, list):
        parts = cast("list[object]", masked)
        others = cast("list[object]", known) if isinstance(known, list) else []
        others = others if len(others) == len(parts) else [None] * len(parts)
        pairs = zip(parts, others, strict=True)
        return cast("Tree", [restore_tree(each, other) for each, other in pairs])
    return masked


def redacted_traceback(error: BaseException) -> str:
    """An error's traceback, its causes included, as text without secrets."""
    return redact("".join(traceback.format_exception(error)))


# Values of the environment

_SECRET_NAME: Final = re.compile(
    r"TOKEN(?!IZ)|KEY(?!BOARD|MAP|ID)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE
)
_COMMON_VALUES: Final = re.compile(
    r"disabled|required|optional|undefined|unlimited|automatic|anonymous|localhost|password"
    r"|changeme|keychain|keyring|not[-_ ]?needed|not[-_ ]?set|tunesmith|postgres|transformers"
    r"|[\d.,_+-]{1,12}",
    re.IGNORECASE,
)
_MIN_LINE_CHARACTERS: Final = 16
"""Of a value of several lines, such as a private key, each line this long is a secret."""


def _environment() -> tuple[str, ...]:
    return tuple(value for name, value in os.environ.items() if _is_secret_name(name))


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


@lru_cache(maxsize=8)
def _secrets_of(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all secret values as they may be written: plain, quoted, escaped."""
    secrets = [part for value in values for part in _parts(value.strip()) if _is_secret(part)]
    forms = {form for secret in secrets for form in _forms(secret)}
    if not forms:
        return None
    return re.compile("|".join(_pattern(form) for form in sorted(forms, key=len, reverse=True)))


def _parts(value: str) -> list[str]:
    lines = [line.strip() for line in value.splitlines()]
    if len(lines) < 2:
        return [value]
    return [value, *(line for line in lines if len(line) >= _MIN_LINE_CHARACTERS)]


def _is_secret(value: str) -> bool:
    """Not a word that every text may hold, a number (as in MAX_TOKENS), a filler or a path."""
    if len(value) < MIN_VALUE_CHARACTERS or len(set(value)) < 4:
        return False
    return not _COMMON_VALUES.fullmatch(value) and not _is_path(value)


def _is_path(value: str) -> bool:
    """Whether it names a place here; a random key may well begin with a slash, too."""
    if value.startswith(("~/", "./", "../")):
        return True
    # os.path, which takes a name that is too long for one that does not exist.
    return value.startswith("/") and os.path.exists("/" + value.split("/")[1])


def _forms(secret: str) -> set[str]:
    """How texts spell it: plain, in an address, in JSON, in Python, in HTML."""
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        repr(secret)[1:-1],
        html.escape(secret),
        *escaped,
    }


def _pattern(secret: str) -> str:
    """A value of letters or digits alone counts only where it stands alone."""
    alone = secret.isalpha() or secret.isdigit()
    return rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])" if alone else re.escape(secret)


# Places that tell a secret

_PARAMETER: Final = (
    r"(?:[\w-]*[_-])?(?:token|secret|password|passwd|pwd|signature|credential|credentials|apikey"
    r"|api[_-]?key|access[_-]?key|auth[_-]?key|secret[_-]?key|security[_-]token)"
    r"|sig|key|auth|ossaccesskeyid|accesskeyid|awsaccesskeyid"
)
_ASSIGNED: Final = (
    r"(?:[\w-]*[_-])?(?:password|passwd|client[_-]?secret|api[_-]?key|secret[_-]?key"
    r"|access[_-]?key|private[_-]?key|(?:access|auth|api|refresh|session|secret|bearer|hf|hub)"
    r"[_-]?token)|m_session_id"
    r"|(?-i:[A-Z][A-Z0-9_]*(?:TOKEN|SECRET|KEY|PASSWORD|CREDENTIALS?))"
)
_WITH_DIGIT: Final = r"(?=[A-Za-z._~+/=-]*\d)[A-Za-z0-9._~+/=-]{8,}"
"""What no word is: eight signs or more of a token's, a digit among them."""

_PLACES: Final[tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...]] = (
    (  # user and password before a host; pathlib leaves one slash of two. git@ is no secret.
        (":/",),
        re.compile(
            r"(?<![A-Za-z0-9])([A-Za-z][A-Za-z0-9+.-]{1,20}:/{1,2})(?!git@)[!$-&(-.0-;=@-~]+@"
        ),
        rf"\1{MASK}@",
    ),
    (
        ("?", "&"),
        re.compile(rf"([?&;](?:{_PARAMETER})=)[^\s&;#'\"<>\\]+", re.IGNORECASE),
        rf"\1{MASK}",
    ),
    (
        ("=", ":"),
        re.compile(
            rf"(?<![\w?&-])((?:{_ASSIGNED})['\"]?\s{{0,2}}(?:=|:|=>)\s{{0,2}}['\"]?){_WITH_DIGIT}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (
        ("authorization",),
        re.compile(
            r"(authorization['\"]?\s*[:=,]\s*b?['\"]?(?:basic|bearer|token|digest|apikey)\s+)"
            r"[^\s'\",;*]{6,}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (
        ("authorization", "-key", "-token"),
        re.compile(
            rf"((?:authorization|x-api-key|api-key|x-[\w-]*token|private-token)['\"]?\s*[:=,]\s*b?['\"]?){_WITH_DIGIT}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (
        ("bearer ",),
        re.compile(rf"\b([Bb]earer )(?:{_WITH_DIGIT}|[A-Za-z0-9._~+/=-]{{24,}})"),
        rf"\1{MASK}",
    ),
    (
        ("private key",),
        re.compile(
            r"(-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----)"
            r".*?(-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
            re.DOTALL,
        ),
        rf"\1{MASK}\2",
    ),
)

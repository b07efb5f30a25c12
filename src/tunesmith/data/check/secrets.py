"""Hints of personal data and secrets in training texts: a model can repeat them word for word."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Final

from tunesmith.io.redact import API_KEY, is_random, may_hold_key

_PRIVATE_KEY: Final = re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----")
_EMAIL: Final = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9-])"
)
# Reserved for documentation (RFC 2606), and what people write when they make an address up.
_MADE_UP_DOMAIN: Final = re.compile(
    r"@(?:.*\.)?example[\w-]*\.\w+$|\.(?:example|test|invalid|localhost)$"
    r"|@(?:test|domain|email|mail|company|yourcompany)\.(?:com|org|net|cn)(?:\.cn)?$",
    re.IGNORECASE,
)
_MOBILE: Final = re.compile(
    r"(?<![\d.])(?:(?:\+|00)86[- ]?)?(1[3-9]\d(?:\d{8}|-\d{4}-\d{4}|\ \d{4}\ \d{4}))(?![\d.]*\d)"
)
_ID_CARD: Final = re.compile(r"(?<![\dA-Za-z])[1-8]\d{5}(?:19|20)\d{9}[\dXx](?![\dA-Za-z])")
_BANK_CARD: Final = re.compile(
    r"(?<![\d.-])(?:\d{4}[ -]){3}\d{1,7}(?![\d.-])|(?<![\d.])\d{15,19}(?![\d.])"
)
# First digits of cards in use: UnionPay 62, Visa 4, Mastercard 51-55 and 2221-2720, Amex 34 and 37.
_CARD_PREFIX: Final = re.compile(r"62\d{14,17}$|4\d{15}$|(?:5[1-5]|2[2-7])\d{14}$|3[47]\d{13}$")
_ID_WEIGHTS: Final = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECK: Final = "10X98765432"


def find_secrets(text: str) -> list[tuple[str, str]]:
    """What in `text` looks like personal data or a secret: (kind, masked excerpt), in text order.

    Kinds: email, mobile_number (mainland China), id_card (China, checksum and birth date right),
    bank_card (Luhn's checksum and a prefix in use), api_key, private_key.

    Not caught: names, addresses, passwords, numbers of other countries, keys of a shape that is
    not in the list, data split by other signs. Addresses at example.com and other made-up domains
    are left out. About one in ten random 16-digit numbers with a card's prefix passes for a card.
    """
    found: list[tuple[int, str, str]] = []
    for kind, may_hold, pattern, is_real in _DETECTORS:
        if may_hold(text):
            found += [
                (match.start(), kind, _masked(match.group(), kind))
                for match in pattern.finditer(text)
                if is_real(match.group())
            ]
    return [(kind, excerpt) for _, kind, excerpt in sorted(found)]


# Looking for a plain piece first is ten times faster than the pattern itself.
_DIGITS: Final = re.compile(r"\d{4}[ -]?\d{4}")


def _may_hold_number(text: str) -> bool:
    return _DIGITS.search(text) is not None


def _masked(secret: str, kind: str) -> str:
    """Enough to find the place again, too little to use: both ends, at most a quarter in all."""
    if kind == "private_key":
        return secret
    if kind == "email":
        name, _, domain = secret.partition("@")
        return f"{name[0]}***@{domain}"
    keep = min(4, len(secret) // 8 or 1)
    return f"{secret[:keep]}***{secret[-keep:]}"


def _is_used_domain(address: str) -> bool:
    return _MADE_UP_DOMAIN.search(address) is None


def _is_id_card(number: str) -> bool:
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(number, _ID_WEIGHTS, strict=False))
    return born.year >= 1900 and _ID_CHECK[total % 11] == number[17].upper()


def _is_bank_card(number: str) -> bool:
    digits = re.sub(r"[ -]", "", number)
    if not _CARD_PREFIX.match(digits) or len(set(digits)) < 4 or _is_id_card_shape(digits):
        return False
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _is_id_card_shape(digits: str) -> bool:
    return len(digits) == 18 and _is_id_card(digits)


def _is_mobile(number: str) -> bool:
    """Not the placeholders that every form shows (13800138000, 13888888888, 13812345678)."""
    digits = re.sub(r"\D", "", number)[-11:]
    return len(set(digits[3:])) > 2 and not digits.endswith(("12345678", "00138000"))


def _is_any(_: str) -> bool:
    return True


_Test = Callable[[str], bool]
_DETECTORS: Final[tuple[tuple[str, _Test, re.Pattern[str], _Test], ...]] = (
    ("private_key", lambda text: "-----BEGIN" in text, _PRIVATE_KEY, _is_any),
    ("api_key", may_hold_key, API_KEY, is_random),
    ("email", lambda text: "@" in text, _EMAIL, _is_used_domain),
    ("id_card", _may_hold_number, _ID_CARD, _is_id_card),
    ("bank_card", _may_hold_number, _BANK_CARD, _is_bank_card),
    ("mobile_number", _may_hold_number, _MOBILE, _is_mobile),
)

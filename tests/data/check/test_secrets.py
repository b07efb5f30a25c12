from __future__ import annotations

import pytest

from tunesmith.data.check.secrets import find_secrets

SECRET = "a1B2c3D4e5F6g7H8i9J0"  # joined at run time, so that no scanner takes this file for a leak


def id_card(first: str) -> str:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(first, weights, strict=True))
    return first + "10X98765432"[total % 11]


def luhn(first: str) -> str:
    return next(first + str(digit) for digit in range(10) if passes_luhn(first + str(digit)))


def passes_luhn(number: str) -> bool:
    total = 0
    for i, digit in enumerate(map(int, reversed(number))):
        total += sum(divmod(2 * digit, 10)) if i % 2 else digit
    return total % 10 == 0


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("email", "ada.lovelace@analytical.org"),
        ("email", "wang-lei+work@mail.pku.edu.cn"),
        ("mobile_number", "13912764507"),
        ("mobile_number", "139-1276-4507"),
        ("mobile_number", "139 1276 4507"),
        ("mobile_number", "+86 13912764507"),
        ("id_card", id_card("11010519491231002")),
        ("id_card", id_card("44030819900514153")),
        ("bank_card", luhn("622202160800314")),
        ("bank_card", luhn("622202160800314729")),
        ("bank_card", "4539 1488 0343 6467"),
        ("bank_card", luhn("37144963539843")),
        ("api_key", "sk-" + SECRET * 2),
        ("api_key", "sk-proj-" + SECRET * 2),
        ("api_key", "AK" + "IA" + "IOSFODNN7ZBCDEFG"),
        ("api_key", "gh" + "p_" + (SECRET * 2)[:36]),
        ("api_key", "hf" + "_" + (SECRET * 2)[:34]),
        ("api_key", "LTAI" + SECRET),
        ("api_key", f"eyJ{SECRET}.eyJ{SECRET}.{SECRET}"),
        ("private_key", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        ("private_key", "-----BEGIN " + "PRIVATE KEY-----"),
    ],
)
def test_secrets_are_found_and_masked(kind: str, secret: str) -> None:
    for text in (secret, f"我的是{secret}，谢谢", f"It is {secret}, thanks"):
        found = find_secrets(text)
        assert [name for name, _ in found] == [kind], text
        if kind != "private_key":
            assert secret not in found[0][1]
            assert "***" in found[0][1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "write to me@example.com or a@b.example.org or you@yourcompany.com",
        "user @mention and 5@6",
        "13800138000, 13888888888 and 13812345678 stand in every form",
        "123456789012345678901234",
        "3.14159265358979323846",
        "11010519491231002" + "0",  # wrong checksum
        id_card("11010519491331002"),  # month 13
        "6222021608003148",  # fails Luhn's check
        "4444 4444 4444 4444",
        "sk-" + "x" * 40,
        "task-" + SECRET * 2,
        "192.168.0.1 and 2024-01-02 10:20:30",
        "-----BEGIN CERTIFICATE-----",
        "order 1391276450712",
    ],
)
def test_harmless_texts_are_left_alone(text: str) -> None:
    assert find_secrets(text) == []


def test_the_order_is_that_of_the_text() -> None:
    text = "call 13912764507 or write to ada@analytical.org, key sk-" + SECRET * 2
    assert find_secrets(text) == [
        ("mobile_number", "1***7"),
        ("email", "a***@analytical.org"),
        ("api_key", "sk-a***i9J0"),
    ]


def test_an_id_card_is_not_also_a_bank_card() -> None:
    assert [kind for kind, _ in find_secrets(id_card("44030819900514153"))] == ["id_card"]


def test_no_real_text_is_reported(real_texts: list[str]) -> None:
    assert [found for text in real_texts if (found := find_secrets(text))] == []

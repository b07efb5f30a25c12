"""Multi-turn rows for the data benchmark, made from a small demo set by repetition with variation.

Conversations of one to five turns are drawn from LLaMA-Factory's Alpaca demo files, Chinese or
English; one in four has a system message. Every message carries notes with a name and a number of
its own, put between its sentences. So no two messages are equal word for word, and remembering
the tokens of a text seen before does not help.

    python benchmarks/data_rows.py --rows 100000 --messages rows.jsonl --sharegpt twin.jsonl

Both files hold the same conversations in the same order: OpenAI messages, and the ShareGPT keys
that LLaMA-Factory reads. Row i depends on the seed and i alone, so a longer file begins with the
shorter one.

Not covered: tools, thinking, and the long tail of real data. No conversation comes near a context
of 4,096 tokens, and the vocabulary of the demo data is small, which favors the word cache inside
tokenizers for everyone alike.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

DEFAULT_DEMO = Path(__file__).resolve().parents[2] / "shared" / "data" / "llamafactory-demo"

MAX_TURNS = 5

SYSTEM_SHARE = 0.25

CHARACTERS_PER_NOTE = 300
"""One note for each so many characters of a message, and at least one."""

MESSAGE_NUMBERS_PER_ROW = 2 * MAX_TURNS + 1

SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}

Message = dict[str, str]


@dataclass(frozen=True)
class Language:
    """What differs between the two demo files."""

    file_name: str
    system: str
    note: str
    names: tuple[str, ...]
    sentence_end: re.Pattern[str]


LANGUAGES = (
    Language(
        file_name="alpaca_zh_demo.json",
        system="你是一位耐心的助手，请用简洁的中文回答。",
        note="（{name}，编号{number}）",
        names=("王伟", "李娜", "张敏", "刘洋", "陈静", "杨帆", "赵磊", "黄丽", "周强", "吴霞"),
        sentence_end=re.compile(r"[。！？；\n]"),
    ),
    Language(
        file_name="alpaca_en_demo.json",
        system="You are a patient assistant. Answer in plain English.",
        note=" ({name}, no. {number})",
        names=(
            "Maria",
            "John",
            "Aisha",
            "Peter",
            "Lena",
            "Diego",
            "Grace",
            "Oliver",
            "Ines",
            "Sam",
        ),
        sentence_end=re.compile(r"[.!?;](?=\s|$)"),
    ),
)


@dataclass(frozen=True)
class Pool:
    """The questions and answers of one language."""

    language: Language
    pairs: tuple[tuple[str, str], ...]


@dataclass
class Totals:
    """What was written."""

    rows: int = 0
    turns: int = 0
    characters: int = 0

    def add(self, messages: list[Message]) -> None:
        """Counts one conversation."""
        self.rows += 1
        self.turns += sum(message["role"] == "assistant" for message in messages)
        self.characters += sum(len(message["content"]) for message in messages)

    @property
    def summary(self) -> str:
        """The totals in one line."""
        return (
            f"{self.rows:,} rows, {self.turns / self.rows:.2f} turns and "
            f"{self.characters / self.rows:,.0f} characters a row"
        )


def write_rows(demo: Path, rows: int, messages: Path, sharegpt: Path, seed: int = 0) -> Totals:
    """Writes the same conversations in both shapes.

    Args:
        demo: Folder with the demo files.
        rows: How many conversations.
        messages: The JSONL file to write in the OpenAI messages format.
        sharegpt: The JSONL file to write in the ShareGPT format.
        seed: Other seeds give other conversations.

    Returns:
        The totals over all rows.
    """
    totals = Totals()
    with messages.open("w", encoding="utf-8") as ours, sharegpt.open("w", encoding="utf-8") as twin:
        for conversation in conversations(read_pools(demo), rows, seed):
            ours.write(to_line({"messages": conversation}))
            twin.write(to_line({"conversations": [as_sharegpt(each) for each in conversation]}))
            totals.add(conversation)
    return totals


def read_pools(demo: Path) -> list[Pool]:
    """The demo data as questions and answers, one pool for each language."""
    pools: list[Pool] = []
    for language in LANGUAGES:
        samples = json.loads((demo / language.file_name).read_text(encoding="utf-8"))
        pairs = tuple((question_of(sample), sample["output"]) for sample in samples)
        pools.append(Pool(language, pairs))
    return pools


def question_of(sample: dict[str, str]) -> str:
    """Instruction and input as one message, the way Alpaca data is read for chat models."""
    return "\n".join(part for part in (sample["instruction"], sample["input"]) if part)


def conversations(pools: list[Pool], rows: int, seed: int) -> Iterator[list[Message]]:
    """The conversations, one after the other."""
    for row in range(rows):
        yield conversation_at(row, pools, Random(f"{seed}:{row}"))


def conversation_at(row: int, pools: list[Pool], rng: Random) -> list[Message]:
    """One conversation in one language."""
    pool = rng.choice(pools)
    plain: list[tuple[str, str]] = []
    if rng.random() < SYSTEM_SHARE:
        plain.append(("system", pool.language.system))
    for question, answer in rng.sample(pool.pairs, rng.randint(1, MAX_TURNS)):
        plain += [("user", question), ("assistant", answer)]
    first_number = row * MESSAGE_NUMBERS_PER_ROW
    return [
        {"role": role, "content": varied(content, first_number + place, pool.language, rng)}
        for place, (role, content) in enumerate(plain)
    ]


def varied(text: str, number: int, language: Language, rng: Random) -> str:
    """The text with notes between its sentences; the number makes it unlike any other."""
    ends = [found.end() for found in language.sentence_end.finditer(text)] or [len(text)]
    wanted = 1 + len(text) // CHARACTERS_PER_NOTE
    places = sorted(rng.sample(ends, min(wanted, len(ends))))
    pieces: list[str] = []
    start = 0
    for count, place in enumerate(places):
        note = language.note.format(name=rng.choice(language.names), number=f"{number}-{count}")
        pieces += [text[start:place], note]
        start = place
    return "".join([*pieces, text[start:]])


def as_sharegpt(message: Message) -> Message:
    """The message under ShareGPT's keys."""
    return {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}


def to_line(row: object) -> str:
    """One line of JSONL."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes both files and prints what is in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=DEFAULT_DEMO, help="folder of the demo files")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--messages", type=Path, required=True, help="JSONL to write: OpenAI")
    parser.add_argument("--sharegpt", type=Path, required=True, help="JSONL to write: ShareGPT")
    options = parser.parse_args()
    totals = write_rows(
        options.demo, options.rows, options.messages, options.sharegpt, options.seed
    )
    print(totals.summary)


if __name__ == "__main__":
    main()

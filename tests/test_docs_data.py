"""Every example of docs/data.md is read as the page says, and the page leaves no format out."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tunesmith.config.load import recipe_from
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.columns import read_samples
from tunesmith.data.readers import find_files
from tunesmith.data.readers.data_file import COMPRESSED_ENDINGS
from tunesmith.data.readers.files import TABLE_ENDINGS, TEXT_ENDINGS
from tunesmith.data.shapes import SHAPES, Shape
from tunesmith.data.shapes.known import ALIASES
from tunesmith.data.sources import find_sources
from tunesmith.data.templates.named import FOLDER
from tunesmith.errors import Problem
from tunesmith.types import SilentReporter

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: (?P<name>\S+))?\n(?P<body>.*?)^```\n"
    r"(?:\nRead as: \*\*(?P<kind>\w+)\*\*)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A fenced block with what the page says of it."""

    language: str
    name: str
    body: str
    kind: str | None
    line: int

    def __str__(self) -> str:
        return f"line {self.line} {self.name or self.language}"


EXAMPLES = [
    Example(
        match["language"],
        match["name"] or "",
        match["body"],
        match["kind"],
        TEXT.count("\n", 0, match.start()) + 1,
    )
    for match in BLOCK.finditer(TEXT)
]
DATA = [e for e in EXAMPLES if e.kind and e.language not in ("yaml", "python")]
RECIPES = [e for e in EXAMPLES if e.language == "yaml"]


def kinds_of(source: SourceConfig, files: list[Path] | tuple[Path, ...]) -> set[str]:
    samples = list(read_samples(source, files))
    problems = [str(sample) for sample in samples if isinstance(sample, Problem)]
    assert samples
    assert not problems
    return {type(sample).__name__.lower() for sample in samples}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All files of the page."""
    for example in EXAMPLES:
        if example.name:
            path = tmp_path / example.name
            path.parent.mkdir(exist_ok=True)
            path.write_text(example.body, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("example", DATA, ids=str)
def test_data(example: Example, folder: Path) -> None:
    files = find_files(folder / example.name)
    assert kinds_of(SourceConfig(path=example.name), files) == {example.kind}


@pytest.mark.parametrize("example", RECIPES, ids=str)
def test_recipes(example: Example, folder: Path) -> None:
    data = data_of(example)
    if example.kind:
        assert kinds_of_recipe(data, folder) == {example.kind}


def test_recipes_that_are_not_read() -> None:
    found = [data_of(example).train[0].path for example in RECIPES if not example.kind]
    assert found == ["chat.jsonl", "old.csv", "sums.jsonl", "hf:org/name", "hf:org/name"]


def data_of(example: Example) -> DataConfig:
    tree: dict[str, Any] = {"model": "some/model", **yaml.safe_load(example.body)}
    return recipe_from(tree, where=f"{PAGE.name}:{example.line}").data


def kinds_of_recipe(data: DataConfig, folder: Path) -> set[str]:
    sources = find_sources(data, lambda path: folder / path, SilentReporter())
    found: set[str] = set()
    for source in (*sources.stored, *sources.validation):
        found |= kinds_of(source.config, source.files)
    return found


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.language == "python"], ids=str)
def test_scripts(example: Example, folder: Path) -> None:
    before = set(folder.iterdir())
    subprocess.run([sys.executable, example.name], cwd=folder, check=True)
    written = sorted(set(folder.iterdir()) - before)
    assert [path.name for path in written] == [
        *("smiths.arrow", "smiths.parquet", "smiths.tsv.gz", "smiths.xlsx")
    ]
    for path in written:
        assert kinds_of(SourceConfig(path=path.name), find_files(path)) == {example.kind}


def test_every_data_block_says_what_it_is_read_as() -> None:
    mapped = [e.name for e in EXAMPLES if e.name and not e.kind]
    assert mapped == [
        *("tickets.jsonl", "sums.jsonl", "helpdesk.csv", "support.jsonl", "both.jsonl"),
        *("lf/dataset_info.json", "lf/grammar.json", "lf/talks.json", "general.jsonl"),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_section_with_an_example(shape: str) -> None:
    assert shape in get_args(SourceConfig.model_fields["format"].annotation)
    assert f"[`{shape}`](#{shape})" in TEXT
    section = TEXT.partition(f"\n### {shape}\n")[2].partition("\n##")[0]
    assert BLOCK.search(section)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_the_columns_of_every_shape_are_in_the_table(shape: Shape) -> None:
    (row,) = re.findall(rf"^\| \[`{shape.name}`\].*$", TEXT, re.MULTILINE)
    needed, optional = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[2:4])
    assert tuple(needed) == shape.required
    assert set(optional) <= set(shape.optional)
    for column in shape.columns:
        assert f"`{column}`" in TEXT


@pytest.mark.parametrize("column", ALIASES)
def test_every_other_name_of_a_column_is_in_the_table(column: str) -> None:
    (row,) = re.findall(rf"^\| `{column}` \| (`.*) \|$", TEXT, re.MULTILINE)
    known = {other for other in ALIASES[column] if other not in ("messages", "conversations")}
    if column == "messages":
        known.discard("conversation")
    assert set(re.findall(r"`(\S+)`", row)) == known


@pytest.mark.parametrize(
    "ending", [*TEXT_ENDINGS, *TABLE_ENDINGS, *COMPRESSED_ENDINGS, ".mindrecord"]
)
def test_every_file_format_is_in_the_table(ending: str) -> None:
    table = TEXT.partition("## File formats")[2].partition("\n\nJSON is known")[0]
    assert f"`{ending}`" in table


@pytest.mark.parametrize("key", SourceConfig.model_fields)
def test_every_key_of_a_source_is_in_the_table(key: str) -> None:
    table = TEXT.partition("Everything a source may say:")[2].partition("\n## ")[0]
    assert f"`{key}`" in table


@pytest.mark.parametrize("key", sorted(set(DataConfig.model_fields) - {"train", "names"}))
def test_every_key_of_the_data_is_on_the_page(key: str) -> None:
    assert re.search(rf"`{key}\b|^  {key}:", TEXT, re.MULTILINE)


def test_every_template_is_in_the_table() -> None:
    table = TEXT.partition("## Chat templates")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE))
    assert named == {"auto", "plain", *(path.stem for path in FOLDER.glob("*.jinja"))}


def test_links_within_the_page() -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_options_of_check() -> None:
    from typer.main import get_command

    from tunesmith.cli.main import app

    section = TEXT.partition("## tunesmith check")[2]
    group: Any = get_command(app)
    known = {option for param in group.commands["check"].params for option in param.opts}
    used = set(re.findall(r"--[a-z]+", section))
    assert used
    assert used == {option for option in known if option.startswith("--")} - {"--help"}

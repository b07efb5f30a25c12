"""What the documents say is true: error codes, public names, recipe examples."""

import re
from pathlib import Path

import pytest
import yaml

import tunesmith
from tunesmith.config.load import recipe_from

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (
    "recipe|data|model|run|checkpoint|numbers|memory|disk|lock|archive|path|reward|evaluate|export"
)
CODE = re.compile(rf'"((?:{FAMILIES})\.[a-z]+(?:-[a-z]+)*)"')


def raised_codes() -> set[str]:
    """Codes in the places where errors are made: the first argument of an error or a problem."""
    codes: set[str] = set()
    makers = re.compile(
        r"(?:Error|Problem|_load_error|Interrupted)\(\s*(?:[^\"()]*(?:\([^()]*\))?[^\"()]*,\s*)?"
        r'(?:f?"[^"]*",\s*)?' + CODE.pattern
    )
    for file in (ROOT / "src" / "tunesmith").rglob("*.py"):
        codes |= {match.group(1) for match in makers.finditer(file.read_text(encoding="utf-8"))}
    return codes


def test_every_error_code_is_documented() -> None:
    documented = set(re.findall(r"^\| `([a-z.-]+)`", (ROOT / "docs/errors.md").read_text(), re.M))
    assert raised_codes() - documented == set()
    everywhere = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "src" / "tunesmith").rglob("*.py")
    )
    assert {code for code in documented if f'"{code}"' not in everywhere} == set()


def test_public_names() -> None:
    assert sorted(tunesmith.__all__) == tunesmith.__all__
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tunesmith.no_such_name


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_recipes_in_the_readme_are_valid(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert recipes
    for recipe in recipes:
        recipe_from(yaml.safe_load(recipe), where=name)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_commands_in_the_readme_exist(name: str) -> None:
    from tunesmith.cli.main import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    text = (ROOT / name).read_text(encoding="utf-8")
    used = set(re.findall(r"^(?:\$ )?tunesmith ([a-z]+)", text, re.M))
    assert used
    assert used <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z]+)", text, re.M)) <= targets


def test_recipes_in_examples_are_valid() -> None:
    recipes = list((ROOT / "examples").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        recipe_from(yaml.safe_load(recipe.read_text(encoding="utf-8")), where=str(recipe))


def test_links_between_documents_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.name}: {target}"

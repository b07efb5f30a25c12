"""The matrix is complete: each row has a test or a reason, and stands in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

from faults.matrix import BEGIN, END, LATER, NAME, PAGE, ROWS, read_results, table, write_page

FOLDER = Path(__file__).parent


def rows_with_tests() -> set[int]:
    sources = [file.read_text(encoding="utf-8") for file in FOLDER.glob("test_*.py")]
    return {int(match[1]) for text in sources for match in NAME.finditer(text)}


def test_each_row_has_a_test_or_a_reason() -> None:
    assert rows_with_tests() == set(ROWS)
    assert set(ROWS) | set(LATER) == set(range(1, 71))
    assert not set(ROWS) & set(LATER)


def test_the_page_has_the_rows() -> None:
    part = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    assert [int(line.split("|")[1]) for line in lines] == list(range(1, 71))
    for line in lines:
        row, fault, expected, outcome = (cell.strip() for cell in line.strip("|").split("|"))
        if int(row) in ROWS:
            assert (fault, expected) == ROWS[int(row)]
            assert "passed" in outcome
            assert "failed" not in outcome


def test_the_table_is_made_of_results(tmp_path: Path) -> None:
    file = tmp_path / "results.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="test_row_01_x[1]" time="1.5"/>'
        '<testcase name="test_row_01_x[2]" time="0.5"><skipped/></testcase>'
        '<testcase name="test_row_02_y" time="1"><failure/></testcase>'
        '<testcase name="test_other" time="1"/></testsuite></testsuites>'
    )
    results = read_results(file)
    assert (str(results[1]), results[1].seconds) == ("1 passed, 1 skipped", 2.0)
    made = table(results)
    assert "1 tests passed, 1 failed." in made
    assert "| 2 | SIGKILL in epoch 2 and 3 |" in made
    page = write_page(f"# Title\n{BEGIN}\nyesterday\n{END}\nafter\n", made)
    assert page.startswith("# Title\n")
    assert page.endswith(f"{END}\nafter\n")
    assert "yesterday" not in page

"""Files larger than what may stand in memory at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, sys
from pathlib import Path
from tunesmith.config.recipe import DataConfig
from tunesmith.data.build import read_sources
from tunesmith.data.sources import find_sources
from tunesmith.types import SilentReporter

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

class Watching(SilentReporter):
    def measure(self, label, items, total, position):
        self.total, self.seen = total, []
        for count, item in enumerate(items):
            if count % 10000 == 0:
                self.seen.append(position() / total)
            yield item

path = Path(sys.argv[1])
reporter = Watching()
sources = find_sources(DataConfig.model_validate(str(path)), Path, reporter)
before = peak()
rows = sum(1 for _ in read_sources(sources.train, reporter))
print(rows, peak() - before, len(set(reporter.seen)), max(reporter.seen))
"""


@pytest.mark.slow
def test_one_line_array_of_300_megabytes(tmp_path: Path) -> None:
    """What `json.dump` writes of a large list is one line: it is read in pieces, the bar moves."""
    path = tmp_path / "big.json"
    answer = "大模型微调需要先看数据。" * 25
    num_rows = 320_000
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            row = {"instruction": f"问题{number}", "input": "", "output": f"{number}{answer}"}
            file.write(("[" if number == 0 else ", ") + json.dumps(row, ensure_ascii=False))
        file.write("]")
    assert path.stat().st_size > 300_000_000
    assert path.read_bytes().count(b"\n") == 0
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True
    )
    rows, growth_mebibytes, num_positions, last = result.stdout.split()
    assert int(rows) == num_rows
    assert int(growth_mebibytes) < 100
    assert int(num_positions) > 25
    assert 0.9 < float(last) <= 1

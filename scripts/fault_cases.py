"""Count the tests that are a case of a fault into report/results/fault_cases.csv, and write
report/faults.md again. `--check` only compares.
"""

import csv
import sys
from collections import Counter
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
TABLE = root / "report" / "results" / "fault_cases.csv"
COLUMNS = ["kind", "places found", "cases", "what happens now"]


class Cases:
    """A pytest plugin: how many of the collected tests are cases of each kind of fault."""

    def pytest_collection_finish(self, session) -> None:
        self.kinds = Counter(kind for item in session.items
                             for mark in item.iter_markers("fault") for kind in mark.args)


def main() -> None:
    """Rewrite the column `cases`; every kind in the tests needs its row, every row at least one
    test.
    """
    plugin = Cases()
    arguments = ["--collect-only", "-p", "no:xdist", "-p", "no:terminal", "-o", "addopts=",
                 str(root / "modern_llm" / "tests")]
    if code := pytest.main(arguments, plugins=[plugin]):
        sys.exit(f"the tests could not be collected: pytest ended with {code!r}")
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if differing := {row["kind"] for row in rows} ^ set(plugin.kinds):
        sys.exit(f"{TABLE}: the rows and the tests' marks differ in {', '.join(sorted(differing))}")
    changed = [row["kind"] for row in rows if row["cases"] != str(plugin.kinds[row["kind"]])]
    if "--check" in sys.argv:
        sys.exit(
            f"other counts than the tests have: {', '.join(changed)}; python scripts/fault_cases.py"
            if changed else 0)
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "cases": plugin.kinds[row["kind"]]} for row in rows)
    from modern_llm.tests.faults.table import write_page

    print(write_page(root / "report"))


if __name__ == "__main__":
    main()

"""Write report/final_report.md from what is published beside it: `make export`. `--check` only
compares.
"""

import re
import sys
from pathlib import Path

from modern_llm.files import write_text
from modern_llm.report.final import final_report

REPORT = Path(__file__).resolve().parent.parent / "report"

if __name__ == "__main__":
    target = REPORT / "final_report.md"
    if "--check" in sys.argv:  # runs that are published here and not on the page are the reader's
        text = target.read_text(encoding="utf-8")
        sys.exit(text != final_report(REPORT, re.findall(r"^## `(.+)`$", text, re.M))
                 and f"{target} is not what report/results says: make export")
    write_text(target, final_report(REPORT))

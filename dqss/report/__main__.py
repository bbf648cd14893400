"""``python -m dqss.report RUN_DIR...``: write the page of one run, or of several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dqss.errors import UserError
from dqss.report.page import REPORT_FILE, write_report

BAD_INPUT = 2
SIDE_BY_SIDE = f"side_by_side_{REPORT_FILE}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser("python -m dqss.report", description="The report of finished searches.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a finished search")
    default = f"default: {REPORT_FILE} in the run folder; of several runs {SIDE_BY_SIDE} here"
    parser.add_argument("-o", "--output", metavar="FILE", help=default)
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and options.output is None:
        # The first run's own report stays as it is.
        options.output = SIDE_BY_SIDE
    try:
        print(f"report in {write_report(options.runs, options.output)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page that people look at: one self-contained file for one run folder or several."""

from dqss.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]

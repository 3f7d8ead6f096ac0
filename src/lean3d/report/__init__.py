"""Self-contained HTML pages: about a run, from what is in its folder, and about a data set, from what a check found."""

from lean3d.report.data import write_data_page
from lean3d.report.page import write_report

__all__ = ["write_data_page", "write_report"]

"""One self-contained HTML page about a run, from its results.json and metrics.jsonl."""

from lean3d.report.page import write_report

__all__ = ["write_report"]

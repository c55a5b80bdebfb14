"""Reports and comparisons of runs: HTML, Markdown and figures out of what lies in a run folder."""

from mllm_cl.reporting.compare import Comparison, compare, comparison_table, write_comparison
from mllm_cl.reporting.report import write_report
from mllm_cl.reporting.run import RunSummary, read_run

__all__ = ["Comparison", "RunSummary", "compare", "comparison_table", "read_run", "write_comparison", "write_report"]

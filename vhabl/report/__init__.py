"""Tables, plots and pages, made from metrics.json records and from finished runs."""

from vhabl.report.table import Table, print_table

__all__ = ["Table", "print_table"]

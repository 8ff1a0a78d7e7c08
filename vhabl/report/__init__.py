"""Tables and plots, made from metrics.json records and from nothing else."""

from vhabl.report.table import print_table, table

__all__ = ["print_table", "table"]

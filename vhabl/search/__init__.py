"""Search by codes: an index on disk, its scans, and the commands that build and ask it."""

from vhabl.search.index import Hit, Index

__all__ = ["Hit", "Index"]

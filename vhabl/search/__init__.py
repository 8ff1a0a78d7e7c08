"""Search by codes: an index on disk, its scans, and the commands that build and ask it."""

from vhabl.search.engine import Hit
from vhabl.search.index import Index

__all__ = ["Hit", "Index"]

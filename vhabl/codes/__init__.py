"""Binary codes: packed bits, and the files that hold them."""

from vhabl.codes.bits import pack, unpack
from vhabl.codes.files import load, mat_name, read_npz, save, texts

__all__ = ["load", "mat_name", "pack", "read_npz", "save", "texts", "unpack"]

"""Binary codes for image-text pairs: hashing methods, exact evaluation, search."""

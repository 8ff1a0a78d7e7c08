"""From codes to records."""

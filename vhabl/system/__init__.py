"""What every part stands on: errors, files, processes."""

"""Other libraries: one file each, the only place where that library is imported."""

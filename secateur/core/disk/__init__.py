"""Files on disk: each written whole or not at all, owned by one process, and read in one place."""

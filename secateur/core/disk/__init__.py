"""Files: whole or not there at all, owned by one process, read in one place."""

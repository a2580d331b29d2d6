"""A pattern, a criterion and an algorithm that the library has never seen, one file each."""

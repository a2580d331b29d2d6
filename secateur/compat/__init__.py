"""Names of other libraries: their calls are translated, and this library does the work."""

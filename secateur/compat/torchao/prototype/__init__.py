"""Old names of prototypes."""

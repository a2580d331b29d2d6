"""What every room stands on: what a weight is, files that are whole or not there, and undo."""

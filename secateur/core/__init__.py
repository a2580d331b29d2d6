"""The ground of every room: what a weight is, files that appear whole or not at all, and undo."""

"""A model, read: its layers, blocks and statistics, what it returns, and plans for it."""

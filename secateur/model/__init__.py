"""Reading a model: its layers, blocks, statistics and outputs, and plans for pruning it."""

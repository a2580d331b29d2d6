"""torch.ao's structured pruning under its own names."""

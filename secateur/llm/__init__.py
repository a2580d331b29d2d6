"""Language models end to end: what makes their tokens, and how fast."""

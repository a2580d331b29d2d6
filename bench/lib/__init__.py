"""What benches share. A bench imports from here, and never another bench."""

"""Plumbing that implementations and measurements share; it knows no mathematics."""

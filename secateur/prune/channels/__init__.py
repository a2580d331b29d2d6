"""Physically smaller layers: which channels may go, and taking them out of all that use them."""

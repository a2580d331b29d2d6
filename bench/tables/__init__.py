"""The tables of README and docs, made from the rows in bench/results: `python -m bench.tables`."""

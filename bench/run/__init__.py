"""One file a question: `python -m bench.run.NAME` measures, and appends rows to bench/results."""

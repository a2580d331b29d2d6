"""`bench.run` is started, `bench.lib` shared, `bench.tables` made from the rows in results."""

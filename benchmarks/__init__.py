"""Speed and memory of every stage beside its limit: `python -m benchmarks.run`."""

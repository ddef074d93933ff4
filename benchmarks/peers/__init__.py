"""lowbit's products in few bits beside those of other libraries, in one run: `python -m benchmarks.peers`."""

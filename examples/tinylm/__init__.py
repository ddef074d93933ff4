"""A small byte-level language model trained on the Python standard library: the real model the demos quantize."""

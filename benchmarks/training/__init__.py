"""Train one member on your own text and go on from it: `memory-bench train` and `memory-bench generate`."""

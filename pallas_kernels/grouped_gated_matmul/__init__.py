"""The gated matmul of rows in groups, gate above up in each expert's weights: `[E, 2 F, K]`."""

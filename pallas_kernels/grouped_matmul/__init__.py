"""y[r] = x[r] @ w[expert of r].T: rows in groups, one expert's weights a group, `[E, N, K]`."""

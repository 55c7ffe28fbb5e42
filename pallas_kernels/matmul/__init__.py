"""y = x @ w.T (+ bias), weights as checkpoints store them: `[N, K]`."""

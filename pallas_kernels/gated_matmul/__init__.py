"""y = silu(x @ gate.T) * (x @ up.T), gate and up one matrix as models store them: `[2 F, K]`."""

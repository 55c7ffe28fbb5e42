"""From the fused projection to attention's inputs: heads, their norms, RoPE, the cache write."""

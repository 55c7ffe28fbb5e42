"""c * tanh(x / c), which keeps logits within a cap."""

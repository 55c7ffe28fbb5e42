"""Log-softmax over the vocabulary."""

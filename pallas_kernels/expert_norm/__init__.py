"""A norm whose input is the sum of each token's experts."""

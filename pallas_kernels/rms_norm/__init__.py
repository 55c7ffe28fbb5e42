"""Root-mean-square normalisation of rows, with the residual addition before it."""

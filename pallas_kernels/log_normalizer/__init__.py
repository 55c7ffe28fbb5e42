"""The normalizer of a row of logits: what turns its logits into log-probabilities."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class LogNormalizer(NamedTuple):
    """Of each row over the vocabulary; a pytree.

    `log_sum` is the logarithm of the sum of exp(logits - maximum), so that one token's
    log-probability needs no array of all of them. Ties of `argmax`: the lowest index. A NaN
    counts as the maximum: argmax is the first one, and its log-probability is NaN.
    """

    maximum: Float[Array, "*rows"]
    log_sum: Float[Array, "*rows"]
    argmax: Int32[Array, "*rows"]

    def log_probs(self, logits: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """(logits - maximum) - log_sum, two roundings, of any n of the row's logits."""
        return (logits - self.maximum[..., None]) - self.log_sum[..., None]

"""Which keys a query sees: its own position, those before it, and none before its window."""

from jaxtyping import Array, Bool, Int32


def sees(
    positions: Int32[Array, "B T"], keys: Int32[Array, " S"], sliding_window: int | None
) -> Bool[Array, "B T S"]:
    """Does the query at position p see key s: s <= p, and s > p - `sliding_window` if there is one.

    The convention of Hugging Face (`sliding_window_overlay` in its masking_utils.py): a window of
    1 is the query's own key alone. Position -1 sees nothing.
    """
    at = positions[:, :, None]
    seen = keys <= at
    return seen if sliding_window is None else seen & (keys > at - sliding_window)

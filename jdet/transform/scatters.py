"""To come."""

FIXED = {}

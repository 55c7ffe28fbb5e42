"""`batch_invariant`: anybody's function with fixed trees. See `jdet.transform.api`."""

from jdet.transform.api import batch_invariant as batch_invariant
from jdet.transform.choices import register_rule as register_rule

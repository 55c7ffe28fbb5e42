"""Accelerators to compile for without having one."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies


def without_device(
    target_config: str, *, platform: str = "cuda", topology: str = "1x1x1"
) -> Callable[[Any], Any]:
    """place(tree): the arrays of a tree as shapes on one device of a described kind.

    Args:
      target_config: XLA's description of the card, as text (openxla/xla,
        xla/backends/gpu/target_config/specs). jax's plugin for the platform must be installed;
        no driver and no card are needed.

    Nothing is autotuned without a card: what XLA would choose by timing does not show.
    """
    target = topologies.get_topology_desc(
        platform=platform, target_config=target_config, topology=topology
    )
    mesh = topologies.make_mesh(topo=target, mesh_shape=(1,), axis_names=("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return place

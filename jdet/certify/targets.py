"""Accelerators to compile for without having one."""

import os
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
    return _on(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


# So that libtpu, where there is no TPU, looks for none, and lets another process load it too.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def without_tpu(topology: str) -> Callable[[Any], Any]:
    """place(tree): the arrays of a tree as shapes on one TPU of a topology, "v6e:2x2" say.

    libtpu must be installed (the extra `tpu`), and JAX_PLATFORMS=cpu be set; environment
    variables that keep it from looking for a TPU are set where they are not.
    """
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    target = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return _on(jax.sharding.SingleDeviceSharding(target.devices[0]))


def _on(sharding: jax.sharding.Sharding) -> Callable[[Any], Any]:
    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return place

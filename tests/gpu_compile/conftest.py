"""An H100 to compile for, without one."""

import pathlib

import jax
import pytest
from jax.experimental import topologies

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")


@pytest.fixture(scope="session")
def on_h100():
    """on_h100(tree): its arrays as shapes on one H100."""
    target = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=target, mesh_shape=(1,), axis_names=("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(tree):
        def place(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, tree)

    return placed

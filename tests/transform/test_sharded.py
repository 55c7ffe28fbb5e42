"""`jdet.batch_invariant` under `jax.shard_map`, on four devices of one CPU.

A process of its own, since the number of devices is a process's.
"""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import jdet

mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
w = np.random.default_rng(0).standard_normal((96, 40), np.float32)
x = np.random.default_rng(1).standard_normal((64, 5, 96), np.float32)

def f(x):
    return jax.nn.softmax(x @ w, -1) @ w.T

def over(f):
    return jax.shard_map(f, mesh=mesh, in_specs=P("b"), out_specs=P("b"))

def gradient(f):
    return lambda x: jax.grad(lambda x: jnp.square(f(x)).sum())(x)

def summed(x):
    return jax.lax.psum(f(x), "b")

def bits(f, sizes=(4, 8, 20, 64)):
    return sorted({np.asarray(f(x[:n])[0]).tobytes().hex() for n in sizes})

fixed = jdet.batch_invariant
alone = bits(jax.jit(fixed(f)), (1,))
alone_gradient = bits(jax.jit(fixed(gradient(f))), (1,))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    total = fixed(over(summed))(x)
print(json.dumps({
    "inside": bits(jax.jit(over(fixed(f)))) == alone,
    "outside": bits(jax.jit(fixed(over(f)))) == alone,
    "not jitted": bits(fixed(over(f)), (4, 20)) == alone,
    "gradient of it": bits(jax.jit(gradient(fixed(over(f))))) == alone_gradient,
    "it of the gradient": bits(jax.jit(fixed(gradient(over(f))))) == alone_gradient,
    "places": jax.jit(fixed(over(f)))(x).sharding.spec == P("b"),
    "sum": bool(np.allclose(total, np.asarray(over(summed)(x)), rtol=1e-4, atol=1e-5)),
    "warned": [str(w.message) for w in warned],
    "plain": len(bits(jax.jit(over(f)))),
    "explained": sorted({"/".join(e.path) for e in fixed.explain(over(f))(x).entries}),
}))
"""


def test_rows_keep_their_bits_wherever_they_are_computed():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("plain") > 1, "the control: plain XLA moves a row"
    [warned] = found.pop("warned")
    assert "psum" in warned and "the order of a sum over devices" in warned
    assert found.pop("explained") == ["shard_map"]
    assert all(found.values()), found

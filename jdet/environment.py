"""What a result was made with: versions, device, the mode in force, the XLA flags found."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jdet import __version__
from jdet.compiler import EnvironmentRefused, check_environment, compiler_options
from jdet.contract import Contract
from jdet.ops import Ops, default_implementation
from jdet.pallas_kernels import OPS, available, implementation_of
from jdet.pallas_kernels.generations import GENERATIONS

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
# Of jaxlib: whose compiler's bits the tests and the committed results have shown.
_SHOWN = "0.11"


def versions() -> dict[str, str]:
    """Versions of jdet, of what computes for it, and of Python."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"jdet": __version__, **found, "python": platform.python_version()}


def device() -> dict[str, Any]:
    """The default backend's devices, and the host's processor.

    Raises:
      ValueError: jax finds no device (a JAX_PLATFORMS that this machine lacks).
    """
    try:
        devices = jax.devices()
    # jax 0.11.2 fails an assertion where JAX_PLATFORMS names only backends it has no plugin for.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no such backend here"])[0]
        raise ValueError(
            f"jax finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}): {reason}"
        ) from None
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        **_generation(devices[0]),
        "count": len(devices),
        "host_cpu": cpu_name(),
        "host_cores": os.cpu_count(),
    }


def _generation(device: Any) -> dict[str, str | None]:
    """Of a TPU, its generation if the kernels have been compiled for it."""
    if device.platform != "tpu":
        return {}
    names = (g.name for g in GENERATIONS if device.device_kind in g.device_kinds)
    return {"generation": next(names, None)}


def kernels(implementation: str) -> list[str]:
    """The ops that have a kernel of their own in it; the others are jnp, which sums nothing."""
    if not implementation.startswith("mosaic"):
        return []
    own = f".{implementation}"
    return [op for op in OPS if implementation_of(op, implementation).__module__.endswith(own)]


def cpu_name() -> str:
    """The host processor's model name."""
    # On the CPU backend jax calls every device "cpu", and the bits follow the architecture.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe() -> dict[str, Any]:
    """All that `jdet env` reports; made of plain values, to be written as JSON.

    Refused XLA_FLAGS are reported under "xla_flags", not raised.

    Raises:
      ValueError: jax finds no device.
    """
    flags = {"found": os.environ.get("XLA_FLAGS", ""), "accepted": True, "refusal": None}
    try:
        check_environment()
    except EnvironmentRefused as error:
        flags |= {"accepted": False, "refusal": str(error)}
    where = device()
    notes = []
    try:
        implementation = default_implementation()
    except NotImplementedError as error:
        implementation = None
        notes.append(str(error))
    if where["platform"] in ("gpu", "cuda") and implementation == "portable":
        notes.append("the GPU kernels are for Hopper cards: `portable` (jnp) is used on this one")
    if implementation == "mosaic_gpu":
        notes.append("float32 models use `portable` (jnp): the GPU kernels take 16-bit operands")
    if implementation == "mosaic_tpu":
        notes.append("the TPU kernels were compiled and interpreted: no TPU has run them yet")
    jaxlib = versions()["jaxlib"]
    if not jaxlib.startswith(f"{_SHOWN}."):
        notes.append(
            f"the guarantees are shown for jaxlib {_SHOWN}, not for {jaxlib}: try `jdet certify`"
        )
    contract = Contract()
    return {
        "versions": versions(),
        "device": where,
        "mode": {
            "implementation": implementation,
            "kernels": kernels(implementation) if implementation else [],
            "batch_invariant": implementation is not None and flags["accepted"],
        },
        "implementations": {op: list(available(op)) for op in OPS},
        "contract": {"leaves": contract.leaves, "kv_split": contract.kv_split},
        "fingerprint": Ops(implementation, contract).fingerprint if implementation else None,
        "compiler_options": compiler_options(implementation) if implementation else {},
        "xla_flags": flags,
        "notes": notes,
    }


def as_text(report: dict[str, Any]) -> str:
    """`describe`'s report for people: one line a fact, groups indented."""
    lines = []
    for name, value in report.items():
        title = name.replace("_", " ")
        if isinstance(value, dict):
            lines.append(title)
            lines += [f"  {key:<20} {_plain(entry)}" for key, entry in value.items()]
        elif isinstance(value, list):
            lines += [f"{title.removesuffix('s')}: {entry}" for entry in value]
        else:
            lines.append(f"{title:<22} {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)

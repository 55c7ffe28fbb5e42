"""Small random programs that compute each row of a batch from that row alone.

A program maps x [B, T, D] to y [B, ...]; written for a whole batch, as models are, so that plain
XLA sees the batch size in every dot, sum and loop. What a program does is drawn by `pick`, which
takes one of several options: from `random.Random(seed).choice`, or from hypothesis.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

type Pick = Callable[[Sequence[Any]], Any]
type Step = tuple[str, Callable[[Array], Array]]

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "gauss": lambda x: jnp.exp(-(x * x)),
    "sin": jnp.sin,
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "log": lambda x: jnp.log(x * x + 1),
    "arctan": jnp.arctan,
    "rsqrt": lambda x: x * lax.rsqrt(x * x + 1),
    "pow": lambda x: (x * x + 1) ** 0.3,
    "fma": lambda x: x * 1.7 + x * x * 0.3 - 0.2,
    "swish_product": lambda x: x * jax.nn.sigmoid(x * 1.702) + x * 0.1,
    "relu": jax.nn.relu,
    "expm1": lambda x: jax.nn.elu(x),
}


class _Weights:
    def __init__(self, seed: int, dtype: Any) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int, fan: int = 1) -> Array:
        values = self.rng.standard_normal(shape) / np.sqrt(fan)
        return jnp.asarray(values.astype(np.float32)).astype(self.dtype)

    def index(self, high: int, n: int) -> Array:
        return jnp.asarray(self.rng.integers(0, high, n).astype(np.int32))


def _dense(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    e = pick((1, 3, 8, 17, 40))
    form = pick(("x@w", "bte,ed", "w first", "flat", "vmap", "f32 out"))
    kernel = w(d, e, fan=d)
    forms = {
        "x@w": lambda x: x @ kernel,
        "bte,ed": lambda x: jnp.einsum("btd,ed->bte", x, kernel.T),
        "w first": lambda x: jnp.einsum("ed,btd->bte", kernel.T, x),
        "flat": lambda x: (x.reshape(-1, d) @ kernel).reshape(-1, t, e),
        "vmap": lambda x: jax.vmap(lambda row: row @ kernel)(x),
        "f32 out": lambda x: jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype),
    }
    return f"dense {form} {d}->{e}", forms[form]


def _attention(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    # XLA:CPU has no float16 product of the kind that jax.nn asks for.
    forms = ("einsum",) if w.dtype == "float16" else ("einsum", "sdpa", "causal")
    form = pick(forms)
    heads = pick([h for h in (1, 2, 3) if d % h == 0])
    wk = w(d, d, fan=d)

    def run(x: Array) -> Array:
        q = x.reshape(*x.shape[:2], heads, -1)
        k = (x @ wk).reshape(q.shape)
        if form != "einsum":
            y = jax.nn.dot_product_attention(q, k, q, is_causal=form == "causal")
        else:
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.4
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), q)
        return y.reshape(x.shape)

    return f"attention {form} {heads}", run


def _norm(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    kind = pick(("rms", "layer", "softmax", "softmax T", "log_softmax", "both axes", "max"))
    gain = w(d)

    def layer(x: Array, axes: Any) -> Array:
        centred = x - x.mean(axes, keepdims=True)
        return centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5)

    forms = {
        "rms": lambda x: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain,
        "layer": lambda x: layer(x, -1) * gain,
        "softmax": lambda x: jax.nn.softmax(x, axis=-1),
        "softmax T": lambda x: jax.nn.softmax(x, axis=1),
        "log_softmax": lambda x: jax.nn.log_softmax(x, axis=-1),
        "both axes": lambda x: layer(x, (1, 2)),
        "max": lambda x: x - x.max(axis=(1, 2), keepdims=True) + x.min(1, keepdims=True),
    }
    return f"norm {kind}", forms[kind]


def _along(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    kind = pick(("cumsum", "cumsum D", "cummax", "sort", "top_k", "logcumsumexp", "lse", "prod"))
    forms = {
        "cumsum": lambda x: jnp.cumsum(x, axis=1) * 0.5,
        "cumsum D": lambda x: lax.cumsum(x, axis=2, reverse=True) * 0.2,
        "cummax": lambda x: lax.cummax(x, axis=1),
        "sort": lambda x: jnp.sort(x, axis=-1),
        "top_k": lambda x: lax.top_k(x, max(d // 2, 1))[0],
        "logcumsumexp": lambda x: lax.cumlogsumexp(x, axis=1),
        "lse": lambda x: x + jax.nn.logsumexp(x, axis=(1, 2), keepdims=True) * 0.1,
        "prod": lambda x: x + jnp.prod(x * 0.5 + 1, axis=-1, keepdims=True) * 0.01,
    }
    return kind, forms[kind]


def _move(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    kind = pick(("gather T", "take D", "segments", "swap", "roll", "concat", "at add", "slice"))
    at, segments = w.index(t, t + 2), w.index(3, t)
    columns = w.index(d, d + 1)
    forms = {
        "gather T": lambda x: x[:, at],
        "take D": lambda x: jnp.take(x, columns, axis=-1),
        "segments": lambda x: jax.vmap(lambda row: jax.ops.segment_sum(row, segments, 3))(x),
        "swap": lambda x: x.swapaxes(1, 2),
        "roll": lambda x: x + jnp.roll(x, 1, axis=1) * 0.5,
        "concat": lambda x: jnp.concatenate([x, x[:, :1] * 0.3], axis=1),
        "at add": lambda x: x.at[:, at].add(x[:, :1] * 0.25),
        "slice": lambda x: x[:, :: 2 if t > 1 else 1],
    }
    return kind, forms[kind]


def _window(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    kind = pick(("conv", "depthwise", "dilated", "avg_pool", "max_pool"))
    width = pick((2, 3, 4))
    features = pick((1, 5, 16))
    numbers = ("NWC", "WIO", "NWC")
    kernel = w(width, d, features, fan=width * d)
    deep = w(width, 1, d, fan=width)

    def conv(x: Array, kernel: Array, **options: Any) -> Array:
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=numbers, **options
        )

    def pool(x: Array, start: Any, combine: Any) -> Array:
        # A Python number as the start: jax then knows it for the identity.
        return lax.reduce_window(x, start, combine, (1, width, 1), (1, 1, 1), "SAME")

    forms = {
        "conv": lambda x: conv(x, kernel),
        "depthwise": lambda x: conv(x, deep, feature_group_count=d),
        "dilated": lambda x: conv(x, kernel, rhs_dilation=(2,)),
        "avg_pool": lambda x: pool(x, np.zeros((), x.dtype), lax.add) / width,
        "max_pool": lambda x: pool(x, np.asarray(-np.inf, x.dtype), lax.max),
    }
    return f"{kind} {width}", forms[kind]


def _control(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    kind = pick(("scan", "fori", "checkpoint", "jit", "custom_jvp", "outer", "cond"))
    kernel = w(d, d, fan=d)

    def cell(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(h @ kernel + x)
        return h, h

    def scan(x: Array) -> Array:
        _, ys = lax.scan(cell, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
        return ys.swapaxes(0, 1)

    def body(_: Any, x: Array) -> Array:
        return jnp.tanh(x @ kernel) + x * 0.5

    @jax.custom_jvp
    def soft(x: Array) -> Array:
        return jnp.log(jnp.exp(-jnp.abs(x)) + 1) + jax.nn.relu(x)

    soft.defjvp(lambda p, g: (soft(p[0]), jax.nn.sigmoid(p[0]) * g[0]))
    forms = {
        "scan": scan,
        "fori": lambda x: lax.fori_loop(0, 3, body, x),
        "checkpoint": jax.checkpoint(lambda x: jax.nn.softmax(x @ kernel, axis=-1) + x),
        "jit": jax.jit(lambda x: (x @ kernel) * x.sum(-1, keepdims=True) * 0.1),
        "custom_jvp": soft,
        "outer": lambda x: jnp.einsum("btd,bte->bde", x, x) * 0.1,
        "cond": lambda x: lax.cond(t > 3, lambda x: x @ kernel, lambda x: x + 1, x),
    }
    return kind, forms[kind]


def _turned(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    """Weights that lie the other way than the dot reads them, and sums past 1024."""
    e = pick((1, 5, 16, 65))
    kind = pick(("x@w.T", "halves", "tied", "rows turned", "turned by einsum", "wide", "wide w.T"))
    kernel, up, down = w(e, d, fan=d), w(1030, d, fan=d), w(e, 1030, fan=1030)
    forms = {
        "x@w.T": lambda x: x @ kernel.T,
        "halves": lambda x: (x.astype(jnp.bfloat16) @ kernel.T.astype(jnp.bfloat16)).astype(
            x.dtype
        ),
        "tied": lambda x: (x @ kernel.T) @ kernel,
        "rows turned": lambda x: jnp.einsum("bdt,de->bte", x.swapaxes(1, 2), kernel.T),
        "turned by einsum": lambda x: jnp.einsum("ed,btd->ebt", kernel, x).transpose(1, 2, 0),
        "wide": lambda x: jnp.tanh(x @ up.T) @ down.T,
        "wide w.T": lambda x: jnp.einsum("btu,ue->bte", x @ up.T, down.T.copy()),
    }
    return f"{kind} {e}", forms[kind]


def _divide(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    """By what is constant or broadcast: XLA multiplies by the reciprocal of such a divisor."""
    kind = pick(("number", "numbers", "weights", "by numbers", "mean", "by its norm", "of weights"))
    numbers = np.arange(3, 3 + d).astype(w.dtype)
    gain = jnp.square(w(d)) + 1
    forms = {
        "number": lambda x: x / 3 + x / 7,
        "numbers": lambda x: x / numbers + 0.3,
        "weights": lambda x: x / gain + x,
        "by numbers": lambda x: x[:, :1, :1] / numbers + x / 5,
        "mean": lambda x: x + x.mean((1, 2), keepdims=True),
        "by its norm": lambda x: x / (jnp.abs(x).sum(-1, keepdims=True) + 1),
        "of weights": lambda x: gain / (x * x + 1),
    }
    return f"divided {kind}", forms[kind]


def _constant(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    """Several constants of a row's shape, of floats or born of integers: XLA joins them."""
    kind = pick(("weights", "ranks", "masks", "positions", "iota", "products"))
    within = pick(("plain", "jit", "scan", "fori", "vmap", "cond"))
    ranks = w.index(9, t * d).reshape(t, d)
    forms = {
        "weights": (lambda x, a, b: (x - a) + b, w(t, d), w(t, d)),
        "ranks": (lambda x, a, b: x + a.astype(x.dtype) / 7 + b.astype(x.dtype), ranks, ranks[0]),
        "masks": (
            lambda x, a, b: jnp.where(a, 0.1, 0.7).astype(x.dtype) + x + b,
            *(ranks > 3, w(t, d)),
        ),
        "positions": (
            lambda x, a, b: x * jnp.cos(a.astype(x.dtype) * b) + jnp.sin(a.astype(x.dtype) * b),
            *(jnp.arange(t)[:, None], w(d)),
        ),
        "iota": (
            lambda x, a, b: (
                jnp.arange(d, dtype=x.dtype) * 0.1 + a + x + jnp.eye(t, d, 0, x.dtype) * b
            ),
            *(w(t, d), w(d)),
        ),
        "products": (lambda x, a, b: x * a * b.astype(x.dtype) / 3, w(t, d), ranks),
    }
    f, *constants = forms[kind]

    def step(x: Array, a: Array, b: Array) -> Array:
        return f(x, a, b).astype(x.dtype)

    def run(x: Array) -> Array:
        calls = {
            "plain": step,
            "jit": jax.jit(step),
            "scan": lambda x, a, b: lax.scan(lambda h, _: (step(h, a, b), ()), x, length=2)[0],
            "fori": lambda x, a, b: lax.fori_loop(0, 2, lambda _, h: step(h, a, b), x),
            "vmap": jax.vmap(step, in_axes=(0, None, None)),
            "cond": lambda x, a, b: lax.cond(t > 1, step, lambda x, *_: x * 2, x, a, b),
        }
        return calls[within](x, *constants)

    return f"constant {kind} {within}", run


def _function(pick: Pick, w: _Weights, t: int, d: int) -> tuple[str, Any]:
    name = pick(sorted(_FUNCTIONS))
    return name, _FUNCTIONS[name]


_KINDS = (
    *(_dense, _dense, _attention, _norm, _norm, _along, _move, _window, _control, _function),
    *(_turned, _divide, _constant),
)


@dataclasses.dataclass(frozen=True)
class RandomProgram:
    """A program and what it takes.

    Attributes:
      steps: names and functions, in order.
      t, d: extents of a row.
      dtype: of the rows and the weights.
      given: arrays of a row's shape that are arguments: constants of whoever calls.
    """

    steps: tuple[Step, ...]
    t: int
    d: int
    dtype: str
    given: tuple[Array, ...] = ()

    def __call__(self, x: Array, *given: Array) -> Array:
        for constant in given:
            x = x + constant.astype(x.dtype)
        for _, step in self.steps:
            x = step(x)
        return x

    def under(self, transform: Callable[..., Any]) -> Callable[[Array], Array]:
        """The transformed program on what is given, of x alone."""
        made = transform(self)
        return lambda x: made(x, *self.given)

    def __str__(self) -> str:
        return (
            f"{'given, ' if self.given else ''}{self.dtype}[B, {self.t}, {self.d}]: "
            + " | ".join(name for name, _ in self.steps)
        )

    def rows(self, seed: int, count: int) -> Array:
        """Random rows [count, T, D]; row i is the same for every count."""
        made = [
            np.random.default_rng((seed, i)).standard_normal((self.t, self.d)).astype(np.float32)
            for i in range(count)
        ]
        return jnp.asarray(np.stack(made)).astype(self.dtype)


def random_program(pick: Pick, seed: int) -> RandomProgram:
    """A program of 2 to 5 steps; `seed` makes its weights."""
    dtype = pick(("float32", "float32", "bfloat16", "float16"))
    t, d = pick((1, 2, 5, 7)), pick((1, 3, 6, 24, 33))
    weights = _Weights(seed, dtype)
    steps: list[Step] = []
    shape = jax.ShapeDtypeStruct((2, t, d), dtype)
    for _ in range(pick((2, 3, 4, 5))):
        name, step = pick(_KINDS)(pick, weights, *shape.shape[1:])
        steps.append((name, step))
        out = jax.eval_shape(step, shape)
        shape = jax.ShapeDtypeStruct(out.shape, out.dtype)
    given = weights(t, d), weights.index(9, t * d).reshape(t, d)
    return RandomProgram(tuple(steps), t, d, dtype, pick(((), (), given)))

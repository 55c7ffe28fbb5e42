"""What makes a family, and what the config.json files of the families have in common."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jdet.models.rope import Rope, read_rope

type Json = Mapping[str, Any]
# From a parameter of the decoder, `{}` for a layer's number, to the tensors that are stacked along
# their first axis to make it. A second `{}` in their names is an expert's number: all tensors of
# the first expert come first.
type TensorMap = Mapping[str, tuple[str, ...]]

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def same_name(name: str) -> str | None:
    """The `rename` of a family whose files name the tensors as its map does."""
    return name


class Family(NamedTuple):
    """How one family's published files are read.

    Attributes:
      model_types: the `model_type` values of config.json that are this family's.
      read_config: from config.json to the fields of `DecoderConfig` but `family`. It raises a
        ValueError that names what the config asks for and the decoder has not.
      tensors: the checkpoint map. Parameters that a config has no use for are left out of it.
      published: excerpts of published config.json files, by name.
      rename: from a file's tensor name to the map's; None for a tensor of a part that is not read.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[Json], dict[str, Any]]
    tensors: TensorMap
    published: Mapping[str, Json]
    rename: Callable[[str], str | None] = same_name


def read_shape(config: Json, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields that every family has: sizes, rope, activation, biases of attention.

    Raises:
      ValueError: a key is missing, or asks for what the decoder has not.
    """
    refuse(config, "mlp_bias", "use_mrope", "use_bidirectional_attention")
    act = config.get(activation, "silu")
    if act not in ACTIVATIONS:
        raise ValueError(f"{activation} {act!r} is not supported; use: {', '.join(ACTIVATIONS)}")
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", heads)
    head_dim = whole(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"config has {heads} attention heads over {kv_heads} key heads of {head_dim};"
            " they must divide, and the size be even"
        )
    rope, local_rope = _read_ropes(config)
    bias = bool(config.get("attention_bias", False))
    eps = config.get("rms_norm_eps")
    if not isinstance(eps, float):
        raise ValueError(f"config has rms_norm_eps={eps!r}; expected a number")
    return dict(
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole(config, "intermediate_size"),
        num_hidden_layers=whole(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        local_rope=local_rope,
        rms_norm_eps=eps,
        max_position_embeddings=_context(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[act],
        qkv_bias=bias,
        out_bias=bias,
    )


def _context(config: Json) -> int:
    """The longest sequence: published files of Qwen ask for YaRN and leave their maximum alone."""
    ropes = (rope.context for rope in _read_ropes(config) if rope is not None)
    return max(whole(config, "max_position_embeddings"), *ropes)


def _read_ropes(config: Json) -> tuple[Rope, Rope | None]:
    """The rope of every layer; or of the full ones and of the sliding ones."""
    theta, positions = config.get("rope_theta", 10000.0), whole(config, "max_position_embeddings")
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" not in settings:
        return read_rope(settings, theta, positions), None
    full, local = (settings.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    return read_rope(full, theta, positions), read_rope(local, theta, positions)


def whole(config: Json, key: str, default: int | None = None) -> int:
    """A positive integer of the config; `default` where it is absent or null.

    Raises:
      ValueError: it is missing, or no positive integer.
    """
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config lacks {key!r}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config has {key}={value!r}; expected a positive integer")
    return value


def refuse(config: Json, *keys: str) -> None:
    """Raise ValueError if one of these is set."""
    for key in keys:
        if config.get(key):
            value = str(config[key]).lower() if config[key] is True else repr(config[key])
            raise ValueError(f"config has {key}={value}, which is not supported")


def read_windows(config: Json, sliding: list[bool]) -> tuple[int | None, ...]:
    """The attention window of each layer, from `layer_types` where the config has them.

    Args:
      config: of it `layer_types`, `sliding_window` and what the longest sequence follows from are
        read.
      sliding: which layers slide where it has no `layer_types`.

    Raises:
      ValueError: another number of layers, an unknown type, or layers that slide and no window.
    """
    layers = whole(config, "num_hidden_layers")
    types = config.get("layer_types")
    if types is not None:
        if len(types) != layers:
            raise ValueError(f"config has {len(types)} layer_types for {layers} layers")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"layer type {kind!r} is not supported; use: full_attention, sliding_attention"
                )
        sliding = [t == "sliding_attention" for t in types]
    if not any(sliding):
        return (None,)
    window = whole(config, "sliding_window")
    # As long as the context, it hides nothing.
    seen = window if window < _context(config) else None
    return tuple(seen if slides else None for slides in sliding)

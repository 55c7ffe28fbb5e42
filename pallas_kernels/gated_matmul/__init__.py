"""y = act(x @ gate.T) * (x @ up.T), gate and up one matrix as models store them: `[2 F, K]`."""

from typing import Literal

type Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")

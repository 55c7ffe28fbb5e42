"""gelu(gate) * up with GELU's tanh form, the gated activation of Gemma's MLP."""

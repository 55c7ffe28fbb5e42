"""silu(gate) * up, the gated activation of Llama's MLP."""

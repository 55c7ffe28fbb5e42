"""Decoders in Flax NNX and their checkpoint maps. Layers call `jdet.ops` only."""

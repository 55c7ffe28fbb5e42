"""Causal grouped-query attention over a KV cache: one tree for prefill, chunks and decode."""

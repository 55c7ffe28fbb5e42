"""The engine: continuous batching, paged cache and prefix cache that no bit depends on."""

"""The engine that serves many generations and adapters at once, on a paged KV cache."""

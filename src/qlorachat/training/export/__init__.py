"""An adapter merged into its base, in 16 bit or as GGUF, and how much it still says the same."""

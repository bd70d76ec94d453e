"""Data in, an adapter out: QLoRA that plans its memory, shows its progress and survives a kill.

Importing this imports no torch: the command line reads the options from here.
"""

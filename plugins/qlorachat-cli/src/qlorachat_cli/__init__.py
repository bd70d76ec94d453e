"""The terminal chat of qlorachat; importing this imports nothing heavy."""

"""The command line: qlorachat chat | serve | plugins | render | check | cache."""

"""`python -m qlorachat` is the command `qlorachat`."""

from qlorachat.cli.main import entry

if __name__ == "__main__":
    entry()

"""Places on the disk, as users write them."""

from pathlib import Path

from qlorachat.errors import ConfigError


def local_path(written: str | Path, *, param: str) -> Path:
    """The path with ~ expanded; ConfigError for one that no file can have."""
    try:
        path = Path(written).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"The {param} {str(written)[:60]!r} is no path ({reason}): give another one.",
            param=param,
        ) from None
    return path

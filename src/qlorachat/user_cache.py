"""Our folder in the user's cache: what can be made again, and takes long."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_root() -> Path:
    """QLORACHAT_CACHE, else our folder in the user's cache folder."""
    if asked := os.environ.get("QLORACHAT_CACHE"):
        return Path(asked).expanduser()
    return user_cache_path("qlorachat", appauthor=False)

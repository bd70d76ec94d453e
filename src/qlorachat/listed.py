"""Options that are lists, however they are given; apart from config.py, which imports less."""

from typing import Annotated

from pydantic import BeforeValidator
from pydantic_settings import NoDecode


def listed(value: object) -> object:
    """Flags and the environment give one string, with a comma between items; files give a list."""
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


Listed = Annotated[list[str], NoDecode, BeforeValidator(listed)]

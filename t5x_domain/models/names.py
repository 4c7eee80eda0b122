"""The names of parameters."""

from typing import Any


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter: 'encoder/layers/blocks/0/mlp/inner/wo/kernel'."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)

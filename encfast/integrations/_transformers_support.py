"""Which transformers is installed, and whether encfast knows it."""

from __future__ import annotations

import re
from typing import Any

NAME = "encfast"
CHECKED_WITH = ("5.18", "5.24")  # the oldest and the newest
_OLDEST, _NEXT_MAJOR = (5, 18), (6, 0)


def installed() -> Any:
    """The module ``transformers``.

    Raises:
        ImportError: if it is missing or of a version that encfast does not know; the message names
            the versions that it does.
    """
    oldest, newest = CHECKED_WITH
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "encfast.integrations.transformers needs transformers, which is not installed; "
            f"it was checked with {oldest} to {newest}"
        ) from error
    version = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
    if not _OLDEST <= version < _NEXT_MAJOR:
        raise ImportError(
            f"transformers {transformers.__version__} is not one that encfast's hooks know: they "
            f"were checked with {oldest} to {newest}, and take {oldest} and later ones of version "
            f"{_OLDEST[0]}; encfast.models and encfast.ops need no transformers"
        )
    return transformers

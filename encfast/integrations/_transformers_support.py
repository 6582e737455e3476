"""Which transformers encfast's hooks know."""

from __future__ import annotations

from encfast.integrations._library import Library

NAME = "encfast"
LIBRARY = Library(
    "transformers", "5.18", "5.24", "encfast.models and encfast.ops need no transformers"
)
CHECKED_WITH = (LIBRARY.oldest, LIBRARY.newest)

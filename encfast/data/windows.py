"""Long passages for span models: overlapping windows, each a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """``[CLS] question [SEP] piece of the passage [SEP]``."""

    ids: list[int]
    segments: list[int]  # 0 up to the first [SEP], 1 behind it
    passage_start: int  # position of the piece's first token in ids
    offset: int  # position of that token in the passage
    length: int  # tokens of the piece

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Positions in ``ids`` of a passage span (inclusive), or (-1, -1) if it is not all here."""
        if not self.offset <= start <= end < self.offset + self.length:
            return -1, -1
        shift = self.passage_start - self.offset
        return start + shift, end + shift


def span_windows(
    question: Sequence[int],
    passage: Sequence[int],
    *,
    cls_id: int,
    sep_id: int,
    max_length: int = 384,
    stride: int = 128,
    max_question: int = 64,
) -> list[Window]:
    """Windows that together cover the passage (Devlin et al. 2019's run_squad: 384, 128, 64).

    Args:
        question: ids; cut after ``max_question``.
        passage: ids; an empty one gives one window.
        cls_id, sep_id: of the two special tokens.
        max_length: most tokens of a window, all included.
        stride: tokens from the start of one window's piece to the next one's.
        max_question: most tokens of the question.

    Returns:
        The windows, in the order of their pieces.

    Raises:
        ValueError: if ``stride`` is less than 1 or no room is left for the passage.
    """
    question = list(question)[:max_question]
    room = max_length - len(question) - 3
    if stride < 1 or room < 1:
        raise ValueError(
            f"stride={stride} must be >= 1, and max_length={max_length} leave room for the passage "
            f"beside a question of {len(question)} tokens and 3 special ones"
        )
    head = [cls_id, *question, sep_id]
    windows = []
    offset = 0
    while True:
        piece = list(passage[offset : offset + room])
        segments = [0] * len(head) + [1] * (len(piece) + 1)
        windows.append(Window([*head, *piece, sep_id], segments, len(head), offset, len(piece)))
        if offset + room >= len(passage):
            return windows
        # A stride beyond the room would skip tokens.
        offset += min(stride, room)

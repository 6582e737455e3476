"""From a list of examples to one `PackedBatch`, in the data-loader worker."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from encfast.packed import PackedBatch


class PackedCollator:
    """Packs the token ids of a list of examples, for `DataLoader(collate_fn=...)`.

    An example is a sequence of ids (list, array, tensor), or a mapping that has one under `key`.

    Args:
        key: where a mapping keeps its ids.
        max_length: ids beyond it are cut off; None keeps all.

    Raises:
        ValueError: for a ``max_length`` below 1.

    Examples:
        >>> from encfast.data import PackedCollator
        >>> PackedCollator(max_length=3)([[5, 6, 7, 8], [9]])
        PackedBatch(2 sequences, data=(4,) torch.int64 on cpu, max_seqlen=3)
        >>> PackedCollator()([{"input_ids": [5, 6]}, {"input_ids": []}]).lengths()
        tensor([2, 0], dtype=torch.int32)
    """

    def __init__(self, *, key: str = "input_ids", max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: expected at least 1, or None for no limit")
        self.key = key
        self.max_length = max_length

    def __call__(self, examples: Sequence[Any]) -> PackedBatch:
        """Ids int64 `[N]` of all examples as a `PackedBatch`.

        Raises:
            KeyError: if a mapping has no `key`.
            TypeError, ValueError: if ids are not integers in one dimension.
        """
        return PackedBatch.from_list(
            [self._ids(i, x) for i, x in enumerate(examples)], dtype=torch.int64
        )

    def _ids(self, i: int, example: Any) -> torch.Tensor:
        if isinstance(example, Mapping):
            if self.key not in example:
                raise KeyError(f"examples[{i}] has no {self.key!r}, only {sorted(example)}")
            example = example[self.key]
        ids = torch.as_tensor(example)
        if ids.dim() != 1:
            raise ValueError(f"examples[{i}] has ids of shape {tuple(ids.shape)}, expected [L]")
        if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            raise TypeError(f"examples[{i}] has ids of {ids.dtype}, expected integers")
        return ids[: self.max_length]

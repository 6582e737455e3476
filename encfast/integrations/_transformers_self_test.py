"""Does transformers call attention and masks the way encfast knows? Two small models say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encfast.integrations._transformers_attention import attention_forward
from encfast.integrations._transformers_masks import padding_mask
from encfast.integrations._transformers_support import LIBRARY, NAME

_TOLERANCE = 1e-5  # fp32, hidden states of unit size
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": None,
    "sep_token_id": None,
}


def register_attention() -> None:
    """Registers the attention and its masks together: with one alone, padding would be attended to.

    Raises:
        ImportError: if transformers is missing or of a version that encfast does not know.
        RuntimeError: if a small model computes something else; nothing is registered then.
    """
    transformers = LIBRARY.load()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    entries = ((AttentionInterface, attention_forward), (AttentionMaskInterface, padding_mask))
    known = NAME in AttentionInterface._global_mapping
    for interface, function in entries:
        interface.register(NAME, function)
    try:
        _self_test()
    except Exception as error:
        for interface, _ in () if known else entries:
            del interface._global_mapping[NAME]
        raise RuntimeError(
            f"transformers {transformers.__version__} calls attention in a way that encfast does "
            f"not know; it was checked with {LIBRARY.checked_with}: {error}"
        ) from error


def _self_test() -> None:
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

    # A window over three tokens in every second layer.
    windows: dict[str, Any] = {"local_attention": 2, "global_attn_every_n_layers": 2}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        _compare(BertModel(BertConfig(**_SIZES)))
        _compare(ModernBertModel(ModernBertConfig(**_SIZES, **windows)))


def _compare(model: Any) -> None:
    """Raises AssertionError unless the model computes what it does with its own attention."""
    model = model.float().eval()
    ids = torch.arange(24).view(3, 8) % 31 + 1
    mask = (torch.arange(8) < torch.tensor([[8], [5], [1]])).long()
    found, expected = (_states(model, name, ids, mask) for name in (NAME, "eager"))
    torch.testing.assert_close(found, expected, rtol=0, atol=_TOLERANCE)


def _states(model: Any, name: str, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of the tokens that are no padding, by the attention of this name."""
    model.set_attn_implementation(name)
    return model(ids, attention_mask=mask).last_hidden_state[mask.bool()]

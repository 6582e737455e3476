"""encfast inside of transformers: attention, experts, and encoders that run unpadded.

    from encfast.integrations import transformers as hook

    hook.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="encfast")

`register` makes the name "encfast" known. With ``attn_implementation="encfast"`` a model keeps its
padding and its attention alone leaves it out; with ``experts_implementation="encfast"`` the experts
of a mixture are grouped products. transformers stores neither name: pass it at every load.

    model = hook.accelerate(AutoModel.from_pretrained(folder))

`accelerate` makes an encoder drop its padding once, in front of the first block, and put it back
behind the last. Names, shapes and values of parameters stay: trainers and adapters see the same
model.

Source: AttentionInterface, AttentionMaskInterface, ExpertsInterface of transformers 5.18 to 5.24.
"""

from __future__ import annotations

from encfast.integrations import _transformers_experts as experts
from encfast.integrations._transformers_attention import attention_forward
from encfast.integrations._transformers_experts import experts_forward
from encfast.integrations._transformers_masks import padding_mask
from encfast.integrations._transformers_packing import accelerate, restore
from encfast.integrations._transformers_self_test import register_attention
from encfast.integrations._transformers_support import CHECKED_WITH, NAME

__all__ = [
    "CHECKED_WITH",
    "NAME",
    "accelerate",
    "attention_forward",
    "experts_forward",
    "padding_mask",
    "register",
    "restore",
]


def register() -> None:
    """Makes "encfast" known as attention, as its masks and as experts, each after a self-test.

    Calling it again changes nothing.

    Raises:
        ImportError: if transformers is missing or of a version that encfast does not know.
        RuntimeError: if it calls attention or passes experts in another way; nothing is registered.

    Examples:
        >>> from encfast.integrations import transformers as hook
        >>> from transformers import BertConfig, BertModel
        >>> hook.register()
        >>> sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
        >>> model = BertModel(BertConfig(vocab_size=99, **sizes, attn_implementation="encfast"))
        >>> model(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """
    interface = experts.interface().ExpertsInterface
    experts.self_test()
    register_attention()
    interface.register(NAME, experts_forward)

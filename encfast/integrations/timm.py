"""Vision transformers of timm on encfast's attention, and its patch dropout on one gather.

    from encfast.integrations import timm as hook

    model = timm.create_model("vit_base_patch16_224", attn_layer=hook.Attention)

or, of a model that exists, with the weights it has:

    model = hook.accelerate(model)

Images of one size have no padding: what attention gains is what the kernel gains, and masks over
keys are skipped instead of added. Names, shapes and values of parameters are timm's.

Source: ``timm.layers.Attention`` and ``PatchDropout`` of timm 1.0.26 to 1.0.31; Liu et al.,
PatchDropout (arXiv:2208.07220).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from encfast.integrations._library import Library

# Before 1.0.26 attention has no is_causal.
_LIBRARY = Library("timm", "1.0.26", "1.0.31", "encfast.layers.Attention needs no timm")
_CLASSES = ("Attention", "PatchDropout", "PatchDropoutWithIndices")
_TOLERANCE = 1e-5  # fp32, outputs of unit size
_ATTRIBUTE = "_encfast_timm_classes"


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the attention and the patch dropout of a timm model run on encfast's ops.

    Args:
        model: holds modules that are ``timm.layers.Attention``, ``PatchDropout`` or
            ``PatchDropoutWithIndices``, and no subclasses of them. Changed in place.

    Returns:
        The model. Its parameters, their names and its modules are what they were; the modules'
        classes become subclasses of themselves.

    Raises:
        ImportError: for a version of timm that encfast does not know.
        NotImplementedError: for a model without such a module, and for an attention with parts
            that encfast does not know; nothing is changed then.
    """
    if any(_ATTRIBUTE in m.__dict__ for m in model.modules()):
        return model
    modules, version = _modules(), _LIBRARY.load().__version__
    ours = {getattr(modules.layers, name): getattr(modules, name) for name in _CLASSES}
    found = [m for m in model.modules() if type(m) in ours]
    name = f"accelerate: {type(model).__name__} with timm {version}"
    if not found:
        others = sorted(
            {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
        )
        raise NotImplementedError(
            f"{name} has none of timm's {', '.join(_CLASSES)}, which encfast serves"
            f"{'; its attention is ' + ', '.join(others) if others else ''}; it stays as it is"
        )
    for module in found:
        unknown = {n for n, _ in module.named_children()} - modules.PARTS
        if unknown:
            raise NotImplementedError(
                f"{name} has {type(module).__name__} with {', '.join(sorted(unknown))}, which "
                f"encfast does not know; it was checked with {_LIBRARY.checked_with}. The model "
                "stays as it is"
            )
    setattr(model, _ATTRIBUTE, [(m, type(m)) for m in found])
    for module in found:
        module.__class__ = ours[type(module)]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Takes :func:`accelerate` back; the model is what it was, its weights are what they are."""
    for top in [m for m in model.modules() if _ATTRIBUTE in m.__dict__]:
        for module, kind in top.__dict__.pop(_ATTRIBUTE):
            module.__class__ = kind
    return model


def __getattr__(name: str) -> Any:
    """The classes inherit from timm's, which this module does without until asked."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_modules(), name)


def _modules() -> Any:
    """The classes, after a self-test of the first call."""
    version = _LIBRARY.load().__version__
    from encfast.integrations import _timm_modules

    _self_test(version)
    return _timm_modules


@functools.cache
def _self_test(version: str) -> None:
    """Raises RuntimeError unless the class computes what timm's own does."""
    from encfast.integrations import _timm_modules as ours

    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            plain = ours.layers.Attention(
                32, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm
            )
            module = ours.Attention(32, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
            module.load_state_dict(plain.state_dict())
            x, mask = torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[5], [2]])
            for given in (None, mask[:, None, None]):
                torch.testing.assert_close(
                    module(x, attn_mask=given), plain(x, attn_mask=given), rtol=0, atol=_TOLERANCE
                )
    except Exception as error:
        raise RuntimeError(
            f"timm {version} computes attention in a way that encfast does not know; it was "
            f"checked with {_LIBRARY.checked_with}: {error}"
        ) from error

"""VL-JEPA's optimiser: the text encoder learns at a fraction of the predictor's rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encfast.models.vl_jepa import VlJepa


def param_groups(model: VlJepa, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimiser: Y's parameters at ``text_lr_ratio`` of ``lr``, frozen ones in none.

    All of Y counts, its projection too. Vectors and single numbers (norms, biases, the
    temperature) do not decay.

    Args:
        model: see above.
        lr: of everything but Y.
        weight_decay: of matrices.

    Returns:
        Dictionaries with ``params``, ``lr`` and ``weight_decay``.
    """
    groups = []
    own = {id(p) for p in model.text.parameters()}
    for is_text in (False, True):
        learned = [p for p in model.parameters() if p.requires_grad and (id(p) in own) == is_text]
        rate = lr * model.config.text_lr_ratio if is_text else lr
        for decays in (True, False):
            params = [p for p in learned if (p.dim() > 1) == decays]
            decay = weight_decay if decays else 0.0
            groups.append({"params": params, "lr": rate, "weight_decay": decay})
    return groups

"""The loss of in-batch negatives against sentence-transformers' own class.

Run as a script, this file is the processes: their results lie in the folder that it is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # of the script, for tests/processes.py
from processes import fork, run_script

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    MultipleNegativesRankingLoss as Plain,
)

from encfast.integrations import sentence_transformers as hook  # noqa: E402
from encfast.integrations.sentence_transformers import (  # noqa: E402
    MultipleNegativesRankingLoss as Ours,
)

WORLD = 2
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
FORMS = {
    "default": {},
    "dot": {"similarity_fct": st.util.dot_score, "scale": 0.3},
    "symmetric": {"directions": ALL[::2], "partition_mode": "per_direction"},
    "both ways, joint": {"directions": ALL[::2]},
    "queries": {"directions": ALL[:2]},
    "all": {"directions": ALL},
}


def embeddings(columns: int, rows: int = 13, seed: int = 0) -> list[Tensor]:
    """Anchors, and documents near them of lengths that differ."""
    draw = torch.Generator().manual_seed(seed)
    anchors = torch.randn(rows, 24, generator=draw)
    docs = [anchors + (i + 1) * torch.randn(rows, 24, generator=draw) for i in range(columns - 1)]
    return [x.requires_grad_() for x in (anchors, *(d.detach() for d in docs))]


def run(kind: type, leaves: list[Tensor], **form) -> tuple[Tensor, ...]:
    """Loss and gradients of all embeddings."""
    loss = kind(nn.Identity(), **form).compute_loss_from_embeddings(leaves, torch.empty(0))
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_same(found, expected) -> None:
    assert all(x.abs().max() > 1e-3 for x in expected)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_loss_and_gradients(columns, form):
    found, expected = (run(kind, embeddings(columns), **FORMS[form]) for kind in (Ours, Plain))
    assert_same(found, expected)


@pytest.mark.parametrize("form", ["default", "all"])
def test_one_row(form):
    """It has no others: with hard negatives the loss is theirs, without it is 0."""
    for columns in (2, 3):
        leaves = embeddings(columns, rows=1)
        found, expected = (run(kind, leaves, **FORMS[form]) for kind in (Ours, Plain))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of an operator."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_no_matrix_of_scores(form):
    rows = 300
    for kind, holds in ((Ours, False), (Plain, True)):
        with Largest() as seen:
            run(kind, embeddings(3, rows), **FORMS[form])
        assert (seen.numel >= rows * rows) is holds


def test_in_place_of_the_library_class():
    """Forward of tokenized columns, and what trainers write into model cards."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(32, 24)

        def forward(self, features):
            return {"sentence_embedding": self.table(features["input_ids"]).mean(1)}

    ids = torch.randint(32, (3, 9, 5), generator=torch.Generator().manual_seed(1))
    found = []
    for kind in (Ours, Plain):
        model = Bag()
        loss = kind(model, scale=10.0)
        value = loss([{"input_ids": x} for x in ids], torch.empty(0))
        found.append((value.detach(), torch.autograd.grad(value, model.table.weight)[0]))
        assert loss.get_config_dict() == Plain(model, scale=10.0).get_config_dict()
    assert_same(*found)
    assert isinstance(loss, Plain)


def process(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for form, options in FORMS.items():
        options = options | {"gather_across_devices": True}
        leaves = embeddings(3, rows=5, seed=rank)
        assert_same(*(run(kind, leaves, **options) for kind in (Ours, Plain)))
        torch.save(form, folder / f"{form}-{rank}.pt")
    dist.destroy_process_group()


def test_over_processes(tmp_path):
    """Every rank's loss, and its gradients from the losses of all."""
    run_script(__file__, tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == WORLD * len(FORMS)


def test_gathering_without_a_group():
    form = {"gather_across_devices": True}
    assert_same(run(Ours, embeddings(3), **form), run(Plain, embeddings(3)))


def test_what_is_refused():
    model = nn.Identity()
    with pytest.raises(NotImplementedError, match=r"similarity_fct is <.*expected util.cos_sim or"):
        Ours(model, similarity_fct=st.util.euclidean_sim)
    with pytest.raises(NotImplementedError, match="hardness_mode is 'all_negatives' with hardness"):
        Ours(model, hardness_mode="all_negatives", hardness_strength=5.0)
    with pytest.raises(ValueError, match="positive value"):
        Ours(model, scale=-1.0)
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        Ours(model).compute_loss_from_embeddings(embeddings(1), torch.empty(0))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        hook.Nothing  # noqa: B018


if __name__ == "__main__":
    fork(process, (WORLD,), Path(sys.argv[1]))

"""sentence-transformers' loss of in-batch negatives on `info_nce`, which holds no matrix of scores.

With s the score of a pair and Z_d the sum of exponentials of a direction's scores, the op gives
``log Z_d - s`` for every row. Those of several directions are averaged ("per_direction"), or joined
in one softmax ("joint"): ``log sum_d Z_d - s`` is the logsumexp of what the op gave.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses
from torch import Tensor

from encfast import ops
from encfast.distributed import gather_features


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence-transformers' class of this name without its matrices.

    Every anchor finds its positive among the positives and hard negatives of the whole batch; the
    arguments, the columns and the value are those of the library's class, which this one is too:
    trainers, model cards and wrappers such as ``MatryoshkaLoss`` take it. Memory beside embeddings
    and their gradients does not grow with the square of the batch.

    Args:
        model: the SentenceTransformer that is trained.
        scale: one over the temperature.
        similarity_fct: ``util.cos_sim`` or ``util.dot_score``; scores of others exist as matrices.
        gather_across_devices: candidates come from all processes, with their gradients
            (:func:`encfast.distributed.gather_features`); as many rows on each.
        directions, partition_mode: as in the library, all of them. The symmetric loss is
            ``("query_to_doc", "doc_to_query")`` with "per_direction".
        hardness_mode, hardness_strength: only without effect: None, or strength 0.

    Raises:
        ValueError: as the library's class does.
        NotImplementedError: for another ``similarity_fct``, and for weights by hardness.

    Source: sentence-transformers 6.2; van den Oord et al. (arXiv:1807.03748).
    """

    def __init__(self, model, scale=20.0, similarity_fct=util.cos_sim, *args, **options) -> None:
        super().__init__(model, scale, similarity_fct, *args, **options)
        if similarity_fct not in (util.cos_sim, util.dot_score):
            raise NotImplementedError(
                f"MultipleNegativesRankingLoss: similarity_fct is {similarity_fct!r}, expected "
                "util.cos_sim or util.dot_score; sentence-transformers has the class that "
                "takes any"
            )
        if self.hardness_mode is not None and self.hardness_strength > 0:
            raise NotImplementedError(
                f"MultipleNegativesRankingLoss: hardness_mode is {self.hardness_mode!r} with "
                f"hardness_strength={self.hardness_strength}, expected None; "
                "sentence-transformers has the class that weighs by hardness"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of embedded columns.

        Args:
            embeddings: ``[B, D]`` each: anchors, positives, then hard negatives.
            labels: not read.

        Returns:
            float32, 0-dim: the mean over the anchors of this process.
        """
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        if self.similarity_fct is util.cos_sim:
            embeddings = [F.normalize(x, dim=1) for x in embeddings]
        queries, positives = embeddings[:2]
        all_queries, *docs = (self._of_all_processes(x) for x in embeddings)
        first = util.get_rank() * len(queries) if self.gather_across_devices else 0
        own = torch.arange(first, first + len(queries), device=queries.device)
        pair = self.scale * (queries.float() * positives.float()).sum(1)
        parts = [self._to_pairs(queries, torch.cat(docs), own)]
        if "doc_to_query" in self.directions:
            parts.append(self._to_pairs(positives, all_queries, own))
        if "query_to_query" in self.directions:
            parts.append(self._to_others(queries, all_queries, own) - pair)
        if "doc_to_doc" in self.directions:  # a column at a time: each has one document of its own
            parts += [self._to_others(positives, column, own) - pair for column in docs]
        rows = torch.stack(parts)
        return (rows.logsumexp(0) if self.partition_mode == "joint" else rows.mean(0)).mean()

    def _of_all_processes(self, x: Tensor) -> Tensor:
        together = self.gather_across_devices and dist.is_available() and dist.is_initialized()
        return gather_features(x) if together else x

    def _to_pairs(self, a: Tensor, b: Tensor, own: Tensor) -> Tensor:
        """``log sum_j exp(x_ij) - x_i,own``, ``[B]``."""
        return ops.info_nce(
            a, b, logit_scale=self.scale, positives=own, directions="rows", reduction="none"
        )

    def _to_others(self, a: Tensor, b: Tensor, own: Tensor) -> Tensor:
        """``log sum over j != own of exp(x_ij)``, ``[B]``: relative to any other row, then not."""
        if len(b) == 1:
            return a.new_full((1,), -torch.inf, dtype=torch.float32)
        other = (own + 1) % len(b)
        loss = ops.info_nce(
            a,
            b,
            logit_scale=self.scale,
            positives=other,
            excluded=own,
            directions="rows",
            reduction="none",
        )
        return loss + self.scale * (a.float() * b[other].float()).sum(1)

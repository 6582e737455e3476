"""CPRD on a planted retrieval task: linear towers learn the teacher's order of hard negatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import ops, ranking_losses

pytestmark = pytest.mark.slow

LATENT, NOISE, SHARED = 32, 0.5, 32  # what is planted, around it, and what a tower has room for
PAIRS, BATCH, STEPS, K = 1024, 128, 300, 24
MARGIN = 0.03  # of Kendall's tau, that the ranking loss has to bring


class World:
    """Images and texts of one latent each, and the relevance of every text to every image."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g)

        latents = draw(PAIRS + 512, LATENT)
        to_image, to_text = draw(LATENT, 64) / LATENT**0.5, draw(LATENT, 64) / LATENT**0.5
        self.images = latents @ to_image + NOISE * draw(len(latents), 64)
        self.texts = latents @ to_text + NOISE * draw(len(latents), 64)
        z = F.normalize(latents * 0.95 ** torch.arange(LATENT), dim=-1)
        self.relevance = z @ z.T
        self.teacher = self.relevance + 0.03 * draw(len(latents), len(latents))


def kendall(student: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean of Kendall's tau over the rows."""
    a, b = ((x[:, :, None] - x[:, None]).sign() for x in (student, truth))
    return (a * b).sum((1, 2)).div(student.shape[1] * (student.shape[1] - 1)).mean()


def train(world: World, kind: str, seed: int) -> tuple[float, float]:
    """Kendall's tau over hard negatives, and R@1, of held-out pairs."""
    torch.manual_seed(seed)
    model = encfast.create("cprd/tiny", num_negatives=K, validity="top_m", top_m=K // 2)
    towers = nn.ModuleList(nn.Linear(64, SHARED) for _ in range(2))
    optimizer = torch.optim.AdamW([*towers.parameters(), model.log_scale], lr=1e-2)

    def features(rows: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(towers, (world.images, world.texts), strict=True)
        return [F.normalize(tower(x[rows]), dim=-1) for tower, x in pairs]

    for _ in range(STEPS):
        rows = torch.randperm(PAIRS)[:BATCH]
        v, t = features(rows)
        scores = world.teacher[rows][:, rows]
        loss = ops.info_nce(v, t, logit_scale=model.log_scale.exp())
        if kind == "ranking":
            loss = loss + sum(model.ranking(v, t, lambda i, j, s=scores: s[i, j])) / (6 * K)
        elif kind == "kl":
            loss = loss + logit_kl(v, t, scores, model.log_scale.exp()) / 6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = torch.arange(PAIRS, len(world.images))
        v, t = features(rows)
        mined = ops.hard_negatives(v, t, K)
        truth = world.relevance[rows][:, rows].gather(1, mined)
        tau = kendall(ops.candidate_dots(v, t, mined), truth).item()
        right = (v @ t.T).argmax(1) == torch.arange(len(rows))
        return tau, right.float().mean().item()


def logit_kl(v, t, scores, scale):
    """Both directions of the baseline, with a teacher whose scores pile up at their ends."""
    total = 0.0
    for a, b, s in ((v, t, scores), (t, v, scores.T)):
        mined = ops.hard_negatives(a, b, K)
        concentrated = 10 * torch.sigmoid(80 * (s.gather(1, mined) - 0.6))
        total = total + ranking_losses.logit_kl(
            scale * ops.candidate_dots(a, b, mined), concentrated
        )
    return total


def test_ranking_teaches_order_and_costs_no_recall():
    """Over three seeds; the KL baseline sees scores of which a few hold all the probability."""
    found = {kind: [] for kind in ("contrastive", "ranking", "kl")}
    for seed in range(3):
        world = World(seed)
        for kind, results in found.items():
            results.append(train(world, kind, seed))
    for kind, results in found.items():
        print(kind, *(f"tau {tau:.3f} R@1 {recall:.3f}" for tau, recall in results))
    for alone, ranking, kl in zip(*found.values(), strict=True):
        assert ranking[0] > alone[0] + MARGIN
        assert ranking[1] > alone[1] - 0.02
        assert kl[0] < ranking[0]

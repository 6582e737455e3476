"""CPRD: the paper's checks of its loss, parity of student and teacher with transformers' parts."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import encfast
from encfast import PackedBatch, ops, ranking_losses, weights
from encfast.models._cprd_names import student_names, teacher_names
from encfast.models.cprd import Cprd, CprdConfig, CrossEncoder, MomentumQueue, PairBatch

from .common import assert_gradient_parity, assert_parity

QUIET = {"dropout": 0.0, "attn_dropout": 0.0}
SQUARE = {"image_size": (24, 24)}  # transformers takes no others


def tiny(**overrides) -> Cprd:
    return encfast.create("cprd/tiny", **QUIET | overrides)


def teacher_of(model: Cprd) -> CrossEncoder:
    return CrossEncoder(model.config).eval()


def features(n: int = 24, m: int = 60, d: int = 16):
    a, b = (torch.nn.functional.normalize(torch.randn(k, d), dim=-1) for k in (n, m))
    return a, b


def ranked(a, b, scores, k=10, **rule):
    """Mined negatives in the teacher's order, of scores [B, M]."""
    mined = ops.hard_negatives(a, b, k)
    return ops.teacher_order(mined, scores.gather(1, mined), **rule)


def loss_and_grads(a, b, candidates, valid, scale=10.0):
    a, b = (x.detach().requires_grad_() for x in (a, b))
    loss = ops.partial_ranking(a, b, logit_scale=scale, candidates=candidates, valid=valid)
    return loss.detach(), *torch.autograd.grad(loss, (a, b))


# What the loss means. That it equals the paper's double sum is in tests/ops/test_partial_ranking.


@pytest.mark.quick
def test_all_valid_is_list_mle():
    a, b = features()
    scores = torch.randn(24, 60)
    mined = ops.hard_negatives(a, b, 10)
    chosen = scores.gather(1, mined)
    candidates, valid = ops.teacher_order(mined, chosen)
    assert (valid == 10).all()
    loss = ops.partial_ranking(a, b, logit_scale=7.0, candidates=candidates, valid=valid)
    want = ranking_losses.list_mle(7 * ops.candidate_dots(a, b, mined), chosen)
    torch.testing.assert_close(loss, want)


@pytest.mark.quick
def test_one_valid_is_info_nce_with_the_teachers_best():
    a, b = features()
    candidates, valid = ranked(a, b, torch.randn(24, 60), top_m=1)
    loss = ops.partial_ranking(a, b, logit_scale=7.0, candidates=candidates, valid=valid)
    logits = 7 * torch.einsum("bd,bkd->bk", a, b[candidates])
    want = nn.functional.cross_entropy(logits, torch.zeros(24, dtype=torch.int64))
    torch.testing.assert_close(loss, want)


@pytest.mark.quick
def test_only_the_order_of_the_teacher_counts():
    a, b = features()
    scores = torch.randn(24, 60)
    plain = loss_and_grads(a, b, *ranked(a, b, scores, threshold=0.2))
    wide = scores.double()
    mapped = ranked(a, b, (5 * wide).exp() + 3, threshold=math.exp(5 * 0.2) + 3)
    for x, y in zip(loss_and_grads(a, b, *mapped), plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.quick
def test_order_matters_among_the_valid_and_not_behind_them():
    a, b = features()
    candidates, valid = ranked(a, b, torch.randn(24, 60), top_m=4)
    before = loss_and_grads(a, b, candidates, valid)[0]
    tail = torch.cat((candidates[:, :4], candidates[:, 4:].flip(1)), 1)
    torch.testing.assert_close(loss_and_grads(a, b, tail, valid)[0], before, rtol=1e-6, atol=0)
    swapped = candidates[:, [1, 0, *range(2, 10)]]
    assert (loss_and_grads(a, b, swapped, valid)[0] - before).abs() > 1e-4


@pytest.mark.quick
def test_the_positive_never_enters():
    """Neither in a numerator nor in a denominator: no gradient from row i into its own text."""
    a, b = features(20, 20)
    candidates, valid = ranked(a, b, torch.randn(20, 20), top_m=4)
    assert not (candidates == torch.arange(20)[:, None]).any()
    for i in (0, 7):
        one = loss_and_grads(a[i : i + 1], b, candidates[i : i + 1], valid[i : i + 1])
        assert not one[2][i].any() and one[2].any()
        moved = b.clone()
        moved[i] = torch.randn(16)
        for x, y in zip(
            loss_and_grads(a[i : i + 1], moved, candidates[i : i + 1], valid[i : i + 1]),
            one,
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.quick
def test_no_valid_negative_gives_nothing():
    model = tiny(threshold=1e9)
    batch = model.example_batch(torch.Generator().manual_seed(0))
    losses = model.loss(batch)
    assert losses.image_to_text == 0 and losses.text_to_image == 0
    assert torch.equal(losses.total, losses.contrastive)


# The system.


@pytest.mark.quick
def test_loss_is_the_sum_of_its_terms():
    model = tiny(rank_weight=0.6, num_negatives=3)
    batch = model.example_batch(torch.Generator().manual_seed(1))
    losses = model.loss(batch)
    out = model(batch.tokens, batch.images)
    scale = model.log_scale.exp()
    want = ops.info_nce(out.images, out.texts, logit_scale=scale)
    torch.testing.assert_close(losses.contrastive, want)
    for mine, theirs, scores, found in (
        (out.images, out.texts, batch.scores, losses.image_to_text),
        (out.texts, out.images, batch.scores.T, losses.text_to_image),
    ):
        candidates, valid = ranked(mine, theirs, scores, 3, threshold=-1.0)
        assert 0 < valid.sum() < valid.numel() * 3
        want = ops.partial_ranking(
            mine, theirs, logit_scale=scale, candidates=candidates, valid=valid
        )
        torch.testing.assert_close(found, want)
    terms = losses.contrastive + 0.3 * (losses.image_to_text + losses.text_to_image)
    torch.testing.assert_close(losses.total, terms)


@pytest.mark.quick
def test_one_temperature_for_both_terms_unless_overridden():
    model = tiny()
    batch = model.example_batch(torch.Generator().manual_seed(1))
    losses = model.loss(batch)
    (shared,) = torch.autograd.grad(losses.image_to_text, model.log_scale)
    assert shared != 0
    model = tiny(rank_temperature=0.5)
    own = model.loss(batch).image_to_text
    assert torch.autograd.grad(own, model.log_scale, allow_unused=True) == (None,)


@pytest.mark.quick
def test_teacher_scores_mined_pairs_alone_and_takes_no_gradient():
    model = tiny(num_negatives=3, validity="all")
    teacher = teacher_of(model)
    batch = model.example_batch(torch.Generator().manual_seed(0), lengths=[5, 9, 3, 12, 7, 4])
    scored = []
    fuse = teacher.fuse
    teacher.fuse = lambda t, i: scored.append(t.batch_size) or fuse(t, i)
    found = model.loss(batch, teacher=teacher)
    assert sum(scored) == 2 * 6 * 3
    found.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    # The same as with all scores at hand, in chunks or not.
    teacher.fuse = fuse
    ids = torch.arange(6)
    images, texts = teacher.images(batch.images), teacher.texts(batch.tokens)
    every = teacher.score(images, texts, ids[:, None].expand(6, 6), ids.expand(6, 6))
    assert every.std() > 0 and not every.requires_grad
    known = dataclasses.replace(batch, scores=every)
    torch.testing.assert_close(model.loss(known).total, found.total)
    for i, j in ((0, 3), (5, 1)):
        text = PackedBatch.from_list([batch.tokens.split()[j]])
        torch.testing.assert_close(
            teacher(batch.images[i : i + 1], text)[0], every[i, j], rtol=1e-4, atol=1e-5
        )


@pytest.mark.quick
def test_queue_serves_the_contrastive_loss():
    model = tiny()
    queue = MomentumQueue(model, size=8, generator=torch.Generator().manual_seed(0))
    batch = model.example_batch(torch.Generator().manual_seed(0))
    before = queue.texts.clone()
    losses = model.loss(batch, queue=queue)
    out = model(batch.tokens, batch.images)
    assert torch.equal(queue.texts[:5], out.texts.detach())
    assert torch.equal(queue.texts[5:], before[5:]) and queue.place == 5
    logits = model.log_scale.exp() * out.images @ torch.cat((out.texts.detach(), before)).T
    want = nn.functional.cross_entropy(logits, torch.arange(5))
    logits = out.texts @ torch.cat((out.images.detach(), _first_images(model, batch))).T
    want = want + nn.functional.cross_entropy(model.log_scale.exp() * logits, torch.arange(5))
    torch.testing.assert_close(losses.contrastive, want / 2)
    model.loss(batch, queue=queue)
    assert queue.place == 2
    losses.total.backward()
    assert all(p.grad is None for p in queue.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    slow = queue.encoder.text_proj.weight.clone()
    queue.follow(model)
    torch.testing.assert_close(queue.encoder.text_proj.weight, slow + 0.005)
    with pytest.raises(ValueError, match="images has 9 rows, the queue holds 8"):
        queue.push(torch.randn(9, 24), torch.randn(9, 24))


def _first_images(model, batch):
    """The random images that a queue of 8 from seed 0 starts from."""
    return MomentumQueue(model, size=8, generator=torch.Generator().manual_seed(0)).images


# Parity.


class Parts(nn.Module):
    """transformers' ViTModel and BertModel, with layers that see an image from `fused` on."""

    def __init__(self, config: CprdConfig, depth: int, fused: int) -> None:
        super().__init__()
        t = pytest.importorskip("transformers")
        self.vit = t.ViTModel(
            t.ViTConfig(
                image_size=config.image_size[0],
                patch_size=config.patch_size[0],
                num_channels=config.channels,
                hidden_size=config.dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.ffn_dim,
                layer_norm_eps=config.norm_eps,
                attn_implementation="eager",
            ),
            add_pooling_layer=False,
        )
        bert = t.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_dim,
            num_hidden_layers=depth,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_ffn_dim,
            max_position_embeddings=config.max_positions,
            layer_norm_eps=config.text_norm_eps,
            attn_implementation="eager",
        )
        if fused < depth:
            bert.is_decoder = bert.add_cross_attention = True
            bert.encoder_hidden_size = config.dim
        self.bert = t.BertModel(bert, add_pooling_layer=False)
        for layer in self.bert.encoder.layer[:fused] if fused < depth else ():
            del layer.crossattention
            layer.add_cross_attention = layer.is_decoder = False
        self.fused = fused
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn_like(p))
            self.bert.embeddings.word_embeddings.weight[0] = 0
        self.eval()

    def text(self, ids, image=None):
        x = self.bert.embeddings(ids[None])
        for i, layer in enumerate(self.bert.encoder.layer):
            seen = image if i >= self.fused else None
            out = layer(x, attention_mask=None, encoder_hidden_states=seen)
            x = out[0] if isinstance(out, tuple) else out
        return x[0, 0]


@pytest.mark.quick
def test_student_is_a_vit_and_a_bert():
    model = tiny(**SQUARE)
    theirs = Parts(model.config, model.config.text_depth, model.config.text_depth)
    names = student_names(model.config)
    own = [f"{m}.{k}" for m in ("image_proj", "text_proj") for k in ("weight", "bias")]
    weights.load(model, theirs.state_dict(), names, keep=[*own, "log_scale"])
    batch = model.example_batch(torch.Generator().manual_seed(0), lengths=[5, 9, 3, 12])
    out = model(batch.tokens, batch.images)
    rows = theirs.vit(batch.images).last_hidden_state[:, 0]
    v = nn.functional.normalize(model.image_proj(rows), dim=-1)
    rows = torch.stack([theirs.text(ids) for ids in batch.tokens.split()])
    t = nn.functional.normalize(model.text_proj(rows), dim=-1)
    assert_parity("images", out.images, v)
    assert_parity("texts", out.texts, t)
    scale = model.log_scale.exp()

    def total(v, t):
        loss = ops.info_nce(v, t, logit_scale=scale)
        for a, b, scores in ((v, t, batch.scores), (t, v, batch.scores.T)):
            order = ranked(a, b, scores, 2, threshold=-1.0)
            loss = loss + 0.5 * ops.partial_ranking(
                a, b, logit_scale=scale, candidates=order[0], valid=order[1]
            )
        return loss

    expected = total(v, t)
    expected.backward()
    for p in model.parameters():
        p.grad = None
    losses = model.loss(batch)
    assert_parity("loss", losses.total, expected)
    losses.total.backward()
    for name in (*own, "log_scale"):
        model.get_parameter(name).grad = None
    assert_gradient_parity(model, theirs, names)


@pytest.mark.quick
def test_teacher_is_a_bert_with_cross_attention():
    model = tiny(**SQUARE, text_dim=48, teacher_depth=4, teacher_text_layers=2)
    teacher = teacher_of(model)
    theirs = Parts(model.config, 4, 2)
    names = teacher_names(model.config)
    weights.load(teacher, theirs.state_dict(), names, keep=["match.weight", "match.bias"])
    batch = model.example_batch(torch.Generator().manual_seed(0), lengths=[5, 9, 3, 12])
    images = theirs.vit(batch.images).last_hidden_state
    first = torch.stack(
        [
            theirs.text(ids, image[None])
            for ids, image in zip(batch.tokens.split(), images, strict=True)
        ]
    )
    scores = teacher.match(first)
    expected = scores[:, 1] - scores[:, 0]
    found = teacher(batch.images, batch.tokens)
    assert_parity("logits", found, expected)
    expected.square().sum().backward()
    for p in teacher.parameters():
        p.grad = None
    found.square().sum().backward()
    teacher.match.weight.grad = teacher.match.bias.grad = None
    assert_gradient_parity(
        teacher, theirs, names, vanishing=[f"blocks.{i}.cross.k.bias" for i in (2, 3)]
    )


@pytest.mark.quick
def test_sizes():
    with torch.device("meta"):
        base = encfast.create("cprd/base")
        teacher = CrossEncoder(base.config)
    vit, bert = 85_798_656, 108_891_648  # ViT-B/16 and BERT-base without pooler and head
    assert base.num_parameters() == vit + bert + 2 * (768 * 256 + 256) + 1
    cross = 6 * (4 * (768 * 768 + 768) + 2 * 768)
    assert teacher.num_parameters() == vit + bert + cross + 2 * 768 + 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
        ({"rank_temperature": math.inf}, "rank_temperature must be a positive finite"),
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
        ({"validity": "treshold"}, "validity 'treshold' is unknown.*threshold"),
        ({"rank_reduction": "mean"}, "rank_reduction must be one of mean_query"),
        ({"teacher_text_layers": 2}, r"teacher_text_layers must be in 0\.\.1, got 2"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


@pytest.mark.quick
def test_batch_errors():
    model = tiny()
    batch = model.example_batch(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="4 images and 5 texts"):
        model.loss(PairBatch(batch.tokens, batch.images[:4], batch.scores))
    with pytest.raises(ValueError, match=r"teacher, or batch.scores of one; both are None"):
        model.loss(PairBatch(batch.tokens, batch.images))
    with pytest.raises(ValueError, match="teacher is in training mode"):
        model.loss(batch, teacher=teacher_of(model).train())

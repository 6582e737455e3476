"""The distillation losses on candidates' scores: against loops over their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from encfast import ops, ranking_losses

LOSSES = ("logit_kl", "list_net", "list_mle", "margin_mse")


def scores(seed: int = 0, n: int = 5, k: int = 7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.quick
def test_logit_kl_is_a_divergence():
    student, teacher = scores()
    want = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    found = ranking_losses.logit_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, 4 * want)
    assert ranking_losses.logit_kl(teacher + 5, teacher).abs() < 1e-12


@pytest.mark.quick
def test_list_net_is_kl_and_the_teachers_entropy():
    student, teacher = scores()
    p = (teacher / 2).softmax(1)
    want = F.cross_entropy(student, p)
    torch.testing.assert_close(ranking_losses.list_net(student, teacher, temperature=2.0), want)


@pytest.mark.quick
def test_list_mle_is_the_likelihood_of_the_order():
    student, teacher = scores()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        order = sorted(range(len(t)), key=lambda j: -t[j])
        for place, j in enumerate(order):
            total -= s[j] - math.log(sum(math.exp(s[i]) for i in order[place:]))
    found = ranking_losses.list_mle(student, teacher)
    assert found.item() == pytest.approx(total / 5)
    # The same as partial_ranking with all valid, on scores that are products.
    ids = torch.arange(7).expand(5, 7)
    candidates, valid = ops.teacher_order(ids, teacher)
    op = ops.partial_ranking(
        student.float(), torch.eye(7), logit_scale=1.0, candidates=candidates, valid=valid
    )
    assert op.item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.quick
def test_margin_mse_is_over_all_pairs():
    student, teacher = scores()
    ours, theirs = (x[:, :, None] - x[:, None, :] for x in (student, teacher))
    pairs = torch.ones(7, 7).triu(1).bool()
    want = (ours - theirs)[:, pairs].square().mean()
    torch.testing.assert_close(ranking_losses.margin_mse(student, teacher), want)
    assert ranking_losses.margin_mse(student[:, :1], teacher[:, :1]) == 0


@pytest.mark.quick
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_go_to_the_student_alone(loss):
    student, teacher = (x.requires_grad_() for x in scores())
    function = getattr(ranking_losses, loss)
    function(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), [student])


@pytest.mark.quick
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_read_in_float32(loss):
    student, teacher = scores(dtype=torch.bfloat16)
    found = getattr(ranking_losses, loss)(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, getattr(ranking_losses, loss)(student.float(), teacher.float())
    )


@pytest.mark.quick
@pytest.mark.parametrize("loss", LOSSES)
def test_errors(loss):
    function, (student, teacher) = getattr(ranking_losses, loss), scores()
    with pytest.raises(ValueError, match=r"student has shape \(0, 7\), expected \[B, K\]"):
        function(student[:0], teacher[:0])
    with pytest.raises(ValueError, match=r"student has shape \(7,\)"):
        function(student[0], teacher[0])
    with pytest.raises(ValueError, match=r"teacher has shape \(5, 6\), expected \(5, 7\)"):
        function(student, teacher[:, :6])
    if loss in ("logit_kl", "list_net"):
        for temperature in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=r"temperature is .* expected a positive finite"):
                function(student, teacher, temperature=temperature)

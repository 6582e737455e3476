"""Metrics against scikit-learn and SciPy."""

import pytest
import scipy.stats
import sklearn.metrics
import torch

from encfast import metrics

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_metrics_equal_sklearn(classes):
    """Sheet 37, check 4."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        predicted, labels = torch.randint(classes, (2, 50), generator=generator)
        p, y = predicted.numpy(), labels.numpy()
        assert metrics.accuracy(predicted, labels) == pytest.approx(
            sklearn.metrics.accuracy_score(y, p)
        )
        assert metrics.matthews(predicted, labels) == pytest.approx(
            sklearn.metrics.matthews_corrcoef(y, p)
        )
        if classes == 2:
            assert metrics.f1(predicted, labels) == pytest.approx(sklearn.metrics.f1_score(y, p))


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_correlations_equal_scipy(ties):
    """Sheet 37, check 4."""
    predicted, labels = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    if ties:
        predicted, labels = predicted.round(), labels.round()
    for ours, theirs in (
        (metrics.pearson, scipy.stats.pearsonr),
        (metrics.spearman, scipy.stats.spearmanr),
    ):
        expected = theirs(predicted.double().numpy(), labels.double().numpy()).statistic
        assert ours(predicted, labels) == pytest.approx(expected)


def test_constant_sides_score_zero():
    zeros, mixed = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 1, 0, 1, 0])
    assert metrics.matthews(zeros, mixed) == 0
    assert metrics.f1(zeros, zeros) == 0
    assert metrics.pearson(zeros, mixed) == 0
    assert metrics.spearman(mixed, zeros) == 0


def test_span_metrics_count_tokens():
    start, end = torch.tensor([3, 3, 8, -1, -1, 2]), torch.tensor([5, 5, 9, -1, -1, 2])
    starts, ends = torch.tensor([3, 4, 0, -1, 4, -1]), torch.tensor([5, 7, 1, -1, 6, -1])
    expected = [1, 2 * 2 / (3 + 4), 0, 1, 0, 0]
    assert metrics.span_f1(start, end, starts, ends).tolist() == pytest.approx(expected)
    assert metrics.exact_match(start, end, starts, ends) == pytest.approx(2 / 6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"predictions \(3,\) and labels \(2,\)"):
        metrics.accuracy(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="M >= 1"):
        metrics.pearson(torch.zeros(0), torch.zeros(0))

"""Learning-rate schedules at their corners."""

import pytest

from encfast.schedules import cosine_schedule

pytestmark = pytest.mark.quick


def test_cosine_schedule():
    values = [cosine_schedule(now, 10, 110, final=0.2) for now in (0, 5, 10, 60, 110, 200)]
    assert values == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])
    assert cosine_schedule(0, 0, 5) == 1
    with pytest.raises(ValueError, match=r"warmup must be in \[0, total\), got 5 of 5"):
        cosine_schedule(0, 5, 5)

"""How `pytest tests/ops --on-gpu` takes calls to a device: nothing of a tensor gets lost."""

import on_gpu
import pytest
import torch

VIEWS = {
    "contiguous": torch.randn(4, 6),
    "transposed": torch.randn(6, 4).t(),
    "rows of a wider matrix": torch.randn(4, 9)[1:, 2:8],
    "expanded": torch.randn(1, 6).expand(4, 6),
    "bool": torch.randn(4, 6) > 0,
    "empty": torch.randn(0, 6),
    "scalar": torch.tensor(3.0),
}


@pytest.mark.quick
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_stays_the_view_it_is(view):
    x = VIEWS[view]
    y = on_gpu.moved(x, "cpu")
    assert torch.equal(x, y) and x.dtype == y.dtype
    assert (x.stride(), x.storage_offset()) == (y.stride(), y.storage_offset())
    assert on_gpu.moved(x, "meta").stride() == x.stride()


@pytest.mark.quick
def test_an_op_sees_its_arguments_on_the_device():
    seen = []

    def op(x, scale, window, nothing):
        seen.append((x.device.type, x.stride(), scale, window, nothing))
        return torch.ones(2), torch.zeros(3)

    outputs = on_gpu.relay(op, "meta")(torch.randn(6, 4).t(), 0.5, [1, 2], None)
    assert seen == [("meta", (1, 4), 0.5, [1, 2], None)]
    assert torch.equal(outputs[0], torch.ones(2)) and torch.equal(outputs[1], torch.zeros(3))

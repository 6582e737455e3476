"""encfast.weights: name maps in both directions, and folders that do not fit."""

import pytest
import torch
from torch import nn

from encfast.weights import Tied, export, load, read_folder, write_folder

pytestmark = pytest.mark.quick


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 8)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.table.weight


MAP = [
    Tied("table.weight", ("wte",)),
    Tied("qkv.weight", ("q", "k", "v"), sizes=(4, 2, 2)),
    Tied("qkv.bias", ("bias",)),
]


def theirs() -> dict[str, torch.Tensor]:
    shapes = {"wte": (5, 4), "q": (4, 4), "k": (2, 4), "v": (2, 4), "bias": (8,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_there_and_back_through_a_folder(tmp_path):
    tensors, model = theirs(), Small()
    write_folder(tmp_path, {"dim": 4}, tensors)
    config, read = read_folder(tmp_path)
    load(model, read, MAP)
    assert config == {"dim": 4}
    assert torch.equal(model.qkv.weight, torch.cat([tensors["q"], tensors["k"], tensors["v"]]))
    assert model.decoder.weight is model.table.weight
    back = export(model, MAP)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_transposed_tensors():
    linear, entries = nn.Linear(3, 2, bias=False), [Tied("weight", ("conv",), transpose=True)]
    load(linear, {"conv": torch.arange(6.0).view(3, 2)}, entries)
    assert torch.equal(linear.weight, torch.arange(6.0).view(3, 2).t())
    assert torch.equal(export(linear, entries)["conv"], torch.arange(6.0).view(3, 2))


def test_missing_surplus_and_misshapen_are_all_listed_and_nothing_is_loaded():
    model, tensors = Small(), theirs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del tensors["k"]
    tensors |= {"extra": torch.ones(1), "wte": torch.ones(6, 4)}
    with pytest.raises(ValueError) as caught:
        load(model, tensors, MAP)
    for words in ("missing: k", "surplus: extra", "(6, 4), expected (5, 4)", "nothing was loaded"):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_parameter_nobody_maps_is_an_error():
    with pytest.raises(ValueError, match=r"not covered: qkv\.bias"):
        load(Small(), {k: v for k, v in theirs().items() if k != "bias"}, MAP[:2])


def test_ignored_names_may_be_there():
    model, tensors = Small(), theirs()
    load(model, tensors | {"position_ids": torch.arange(3)}, MAP, ignore=["position_ids"])
    assert torch.equal(model.table.weight, tensors["wte"])


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_a_file_says_which(tmp_path, file):
    write_folder(tmp_path, {}, theirs())
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.split(".")[-1]):
        read_folder(tmp_path)

"""The registry: names, overrides, descriptions, and errors that name the nearest."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from torch import nn

import encfast
from encfast import registry

pytestmark = pytest.mark.quick


def test_importing_encfast_imports_no_model():
    code = "import sys, encfast; print([m for m in sys.modules if m.startswith('encfast.models')])"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_every_system_has_a_tiny_variant_and_a_full_description():
    names = encfast.list_models()
    assert names == sorted(set(names)) and names
    for system in {name.split("/")[0] for name in names}:
        assert f"{system}/tiny" in names
        described = encfast.describe(f"{system}/tiny")
        info = described.info
        assert described.parameters > 0
        for field in (info.title, info.paper, info.tasks, info.inputs, info.fidelity):
            assert field, (system, info)
        assert set(info.ops) <= set(encfast.ops.OPS)
        assert 1990 < info.year < 2100


def test_list_models_by_pattern_and_task():
    everything = encfast.list_models()
    assert encfast.list_models("bert_*") == [n for n in everything if n.startswith("bert_")]
    assert encfast.list_models("*/tiny") == [n for n in everything if n.endswith("/tiny")]
    by_task = encfast.list_models(task="masked-lm")
    assert by_task and set(by_task) <= set(everything)
    assert encfast.list_models("no such model") == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mosaicbrt/tiny", "mosaicbert"), ("mosaicbert/bas", "base"), ("etin/tiny", "ettin")],
)
def test_an_unknown_name_says_which_is_near(name, nearest):
    with pytest.raises(KeyError, match=nearest):
        encfast.create(name)


def test_an_unknown_field_says_which_is_near():
    with pytest.raises(TypeError, match=r"has no field 'vocab_sise'; did you mean 'vocab_size'"):
        encfast.create("mosaicbert/tiny", vocab_sise=100)


@dataclass(frozen=True)
class PlantedConfig:
    """Config of the planted system."""

    width: int = 3


class Planted(nn.Module):
    def __init__(self, config, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(config.width, 1, device=device, dtype=dtype)


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(registry, "_SYSTEMS", dict(registry._SYSTEMS))
    info = registry.ModelInfo("Planted", 2026, "none", ("test",), "nothing", (), "none")
    return lambda name, model: registry.register(name, model, {"tiny": PlantedConfig()}, info)


def test_register_create_and_override(planted):
    planted("planted", Planted)
    assert encfast.create("planted/tiny", width=5).linear.in_features == 5
    assert encfast.describe("planted/tiny").parameters == 4


def test_a_taken_name_raises(planted):
    planted("planted", Planted)
    with pytest.raises(ValueError, match="'planted' is registered"):
        planted("planted", type("Other", (Planted,), {}))


def test_a_system_without_tiny_raises():
    info = registry.ModelInfo("x", 2026, "x", ("x",), "x", (), "x")
    with pytest.raises(ValueError, match="'tiny'"):
        registry.register("untiny", Planted, {"base": PlantedConfig()}, info)

"""pytest collects the benches: `pytest bench --benchmark-only`, with `--suite full` for more.

Save a run with `--benchmark-save=NAME` and compare a later one by `--benchmark-compare`.
"""

import sys
from pathlib import Path

# The files here import one another by their bare names, as `python bench/run.py` does.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--suite", default="quick", choices=("tiny", "quick", "full"))
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_generate_tests(metafunc):
    if "spec" not in metafunc.fixturenames:
        return
    import run
    from harness import Setting

    option = metafunc.config.getoption
    specs = run.collect(Setting(option("suite"), option("device")))
    cases = [(spec, variant) for spec in specs for variant in spec.variants]
    names = [f"{spec.name}-{variant.name}".replace(" ", "_") for spec, variant in cases]
    metafunc.parametrize(("spec", "variant"), cases, ids=names)

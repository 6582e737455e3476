"""What the JSON of a run of the benches holds."""

import torch


def check_schema(found):
    assert set(found) == {"schema", "environment", "results", "ratios", "targets"}
    env = found["environment"]
    wanted = {"date", "commit", "cpu", "cores", "threads", "clock", "roofs", "encfast", "device"}
    assert wanted <= set(env)
    assert env["encfast"]["versions"]["torch"] == torch.__version__
    for result in found["results"]:
        assert result["unit"] in ("tok/s", "GF/s", "GB/s") and result["work"]
        for row in result["rows"]:
            if row["missing"]:
                assert "pip install" in row["missing"] and not row["ours"]
                continue
            assert row["gate"]["ok"] and row["gate"]["text"]
            assert 0 < row["one"]["p10"] <= row["one"]["median"] <= row["one"]["p90"]
            assert row["one"]["rounds"] >= 1  # fewer than MIN_ROUNDS where the machine is busy
            assert row["rate"] > 0 and row["rate_many"] > 0
    assert all(r["one"] > 0 and r["many"] > 0 for r in found["ratios"])

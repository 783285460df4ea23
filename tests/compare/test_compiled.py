"""Eager and compiled series side by side, each against its own dense model."""

from core.benchmark.results import CompiledPoint, MeasuredVariant, Point, Summary
from core.compare import compiled
from core.runs.workspace import RunRecord
from core.study import Benchmark, Study, Variant

CELL = (1, 12, 32)


def point(kind, variant, seconds, **more):
    return kind(
        variant=variant, batch_size=1, input_tokens=12, output_tokens=32,
        latency_s_p50=seconds, **more,
    )  # fmt: skip


def test_a_speed_up_compares_within_one_series(tmp_path):
    dense, small = Variant("d", "dense", "dense"), Variant("s", "small", "depth")
    summary = Summary(
        compiled=True,
        variants=(MeasuredVariant(name="d"), MeasuredVariant(name="x", uncompiled="No compiler.")),
    )
    bench = Benchmark(
        RunRecord(tmp_path, "benchmark", {}, [], "done", {}),
        summary,
        (point(Point, "d", 2.0), point(Point, "s", 1.6), point(Point, "t", 1.0)),
        {"d": "d", "s": "s"},
        compiled=(
            point(CompiledPoint, "d", 1.0, compile_s=9.0),
            point(CompiledPoint, "s", 0.5, compile_s=8.0),
        ),
    )
    known = Study((dense, small), benchmarks=(bench,))
    first, second = compiled.rows(known, [bench], CELL)
    assert first["variant"] == "dense"
    assert first["compiled over dense"] == 1.0
    assert second["eager over dense"] == 2.0 / 1.6
    assert second["compiled over dense"] == 2.0
    assert second["compiled over eager"] == 3.2
    assert second["tokens/s, compiled"] == 64
    assert compiled.rows(known, [bench], (4, 12, 32)) == []
    (sentence,) = compiled.failures([bench])
    assert sentence == "x could not be measured with compiled steps: No compiler."

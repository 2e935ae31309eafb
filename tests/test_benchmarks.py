"""The benchmarks' own helpers, on a CPU: time on a GPU is a bad place to find a typo."""

import json

import pytest

from benchmarks import environment, hlo, models

HLO = """HloModule jit_f
%body.1 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %a.1 = f32[2]{0} fusion(%p), kind=kLoop, calls=%c
  ROOT %b = f32[2]{0} custom-call(%a.1), custom_call_target="__cublas$gemm"
}
%body.2 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %w = f32[2]{0} while(%p), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %d = f32[2]{0} fusion(%w), kind=kInput, calls=%c
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %w = f32[2]{0} while(%p), condition=%c, body=%body.2, backend_config={"known_trip_count":{"n":"20"}}
}
"""


def test_kernels_of_a_step_count_inner_loops():
    summary = hlo.summary(HLO)
    assert summary["kernels_per_step"] == 7
    assert summary["by_kind"] == {"fusion kLoop": 3, "custom-call __cublas$gemm": 3, "fusion kInput": 1}


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("blocks/mix_ffn/depthwise/kernel", (20, 3, 3, 64), 9),
        ("stage_4/block_0/attention/scale_5/kernel", (5, 5, 96), 25),
        ("stage_4/block_0/attention/scale_5_mix/kernel", (4, 32, 32), 32),
        ("stage_0/block_0/conv_1/kernel", (3, 3, 16, 8), 144),
        ("blocks/self_attn/qkv/kernel", (20, 64, 192), 64),
    ],
)
def test_fan_in(path, shape, expected):
    assert environment.fan_in(path, shape) == expected


def test_results_are_written_and_errors_kept(tmp_path):
    def fail():
        raise ValueError("too large\nmore")

    rows = [environment.attempt({"what": "a"}, lambda: {"ms": 1.0}), environment.attempt({"what": "b"}, fail)]
    environment.write_result(tmp_path / "new" / "rows.json", rows)
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert written["rows"] == [{"what": "a", "ms": 1.0}, {"what": "b", "error": "ValueError: too large"}]
    assert written["machine"]["versions"]["jax"]
    assert environment.table(rows, ("what", "ms")).splitlines() == ["what  ms", "a     1", "b"]


def test_floor_adds_up():
    case = models.Case("1.6B", 1024, batch=2)
    assert models.floor(case, "total") == models.floor(case, "denoise") + 2 * models.DECODE_FLOOR[1024]
    assert models.floor(models.Case("1.6B", 64), "total") is None

import unittest

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.missing import (
    MissingUnits,
    MissingWeightsError,
    report_missing,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

MISSING = [
    MissingUnits("layers.0.mlp.experts.w13_weight", [1, 5], 8),
    MissingUnits("layers.1.self_attn.o_proj.weight", [0], 1),
]


class TestMissing(CustomTestCase):
    def test_error_names_parameters_and_experts(self):
        with self.assertRaises(MissingWeightsError) as raised:
            report_missing(MISSING)
        text = str(raised.exception)
        self.assertIn("layers.0.mlp.experts.w13_weight (2 of 8 experts: 1, 5)", text)
        self.assertIn("layers.1.self_attn.o_proj.weight", text)

    def test_zeros_may_be_served(self):
        with envs.SGLANG_STREAMFP8_ALLOW_MISSING.override(True):
            with self.assertLogs(level="WARNING"):
                report_missing(MISSING)

    def test_nothing_is_missing(self):
        with self.assertNoLogs(level="WARNING"):
            report_missing([])


if __name__ == "__main__":
    unittest.main()

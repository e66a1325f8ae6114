import unittest

from sglang.srt.environ import envs
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.kits.streaming_fp8_kit import StreamingFp8Mixin
from sglang.test.test_utils import (
    DEFAULT_SMALL_MOE_MODEL_NAME_FOR_TEST_BASE,
    CustomTestCase,
)

register_cuda_ci(est_time=240, stage="base-b", runner_config="1-gpu-large")
register_amd_ci(est_time=300, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=300, suite="stage-b-test-1-gpu-small-amd-mi35x")


class TestStreamingFp8Experts(StreamingFp8Mixin, CustomTestCase):
    model = DEFAULT_SMALL_MOE_MODEL_NAME_FOR_TEST_BASE
    # Linear layers, 8 % of what is left, are bf16 until all is loaded
    max_peak_ratio = 1.10

    @classmethod
    def setUpClass(cls):
        # AITER does not support the shape of this model's experts.
        with envs.SGLANG_USE_AITER.override(False):
            super().setUpClass()


if __name__ == "__main__":
    unittest.main()

import unittest

from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.kits.streaming_fp8_kit import StreamingFp8Mixin
from sglang.test.test_utils import DEFAULT_MODEL_NAME_FOR_TEST, CustomTestCase

register_cuda_ci(est_time=240, stage="base-b", runner_config="1-gpu-large")


class TestStreamingFp8Linear(StreamingFp8Mixin, CustomTestCase):
    # The largest weight and what it is quantized to are 4 % of it
    model = DEFAULT_MODEL_NAME_FOR_TEST


if __name__ == "__main__":
    unittest.main()

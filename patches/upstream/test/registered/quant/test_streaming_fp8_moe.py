"""Experts that are quantized while they are loaded serve what is served when they are quantized afterwards."""

from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=240, suite="stage-b-test-small-1-gpu")

import unittest

from sglang.test.test_utils import DEFAULT_SMALL_MOE_MODEL_NAME_FOR_TEST_BASE, CustomTestCase
from test_streaming_fp8 import StreamingFp8Mixin


class TestStreamingFp8Experts(StreamingFp8Mixin, CustomTestCase):
    model = DEFAULT_SMALL_MOE_MODEL_NAME_FOR_TEST_BASE


if __name__ == "__main__":
    unittest.main()

"""Linear layers that are quantized while they are loaded serve what is served when they are quantized afterwards."""

from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=180, suite="stage-b-test-small-1-gpu")

import io
import os
import unittest

import requests
from sglang.srt.utils import kill_process_tree
from sglang.test.test_utils import (
    DEFAULT_SMALL_MODEL_NAME_FOR_TEST_QWEN,
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    DEFAULT_URL_FOR_TEST,
    CustomTestCase,
    popen_launch_server,
)

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "def fibonacci(n):"]


class StreamingFp8Mixin:
    """What holds of every model; subclasses name one as ``model``."""

    def test_streaming_serves_the_same_tokens(self):
        streamed, log = self._serve("1")
        self.assertRegex(log, r"StreamFP8: quantized [1-9]\d* units of [1-9]\d* layers")
        stock, log = self._serve("0")
        self.assertNotIn("StreamFP8", log)
        self.assertEqual(streamed, stock)

    def _serve(self, switch):
        out, err = io.StringIO(), io.StringIO()
        process = popen_launch_server(
            self.model,
            DEFAULT_URL_FOR_TEST,
            timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
            other_args=["--quantization", "fp8"],
            env={**os.environ, "SGLANG_STREAMFP8": switch},
            return_stdout_stderr=(out, err),
        )
        try:
            tokens = [self._continue(prompt) for prompt in PROMPTS]
        finally:
            kill_process_tree(process.pid)
        return tokens, out.getvalue() + err.getvalue()

    def _continue(self, prompt):
        sampling = {"temperature": 0, "max_new_tokens": 16}
        request = {"text": prompt, "sampling_params": sampling}
        answer = requests.post(f"{DEFAULT_URL_FOR_TEST}/generate", json=request, timeout=60)
        answer.raise_for_status()
        return answer.json()["text"]


class TestStreamingFp8Linear(StreamingFp8Mixin, CustomTestCase):
    model = DEFAULT_SMALL_MODEL_NAME_FOR_TEST_QWEN


if __name__ == "__main__":
    unittest.main()

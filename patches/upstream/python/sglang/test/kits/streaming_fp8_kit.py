import io
import re

import requests

from sglang.srt.environ import envs
from sglang.srt.utils import kill_process_tree
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    DEFAULT_URL_FOR_TEST,
    popen_launch_server,
)

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "def fibonacci(n):"]
MEMORY_LOG = r"GPU memory of loading weights: peak ([\d.]+) GiB, final ([\d.]+) GiB"


class StreamingFp8Mixin:
    """Loads ``model``, which a subclass names, with and without streaming."""

    @classmethod
    def setUpClass(cls):
        cls.streamed = cls._serve(streaming=True)
        cls.stock = cls._serve(streaming=False)

    @classmethod
    def _serve(cls, *, streaming):
        out, err = io.StringIO(), io.StringIO()
        with envs.SGLANG_STREAMFP8.override(streaming):
            process = popen_launch_server(
                cls.model,
                DEFAULT_URL_FOR_TEST,
                timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
                other_args=["--quantization", "fp8", "--log-level", "debug"],
                return_stdout_stderr=(out, err),
            )
        try:
            checked = cls._post("weights_checker", {"action": "checksum"})
            tokens = [cls._generate(prompt) for prompt in PROMPTS]
        finally:
            kill_process_tree(process.pid)
        memory = re.search(MEMORY_LOG, out.getvalue() + err.getvalue())
        assert memory is not None, "the log lacks the memory of loading weights"
        peak, final = map(float, memory.groups())
        checksums = [rank["checksums"] for rank in checked["ranks"]]
        return {"tokens": tokens, "checksums": checksums, "peak": peak, "final": final}

    @classmethod
    def _generate(cls, prompt):
        sampling_params = {"temperature": 0, "max_new_tokens": 32}
        body = {"text": prompt, "sampling_params": sampling_params}
        return cls._post("generate", body)["text"]

    @staticmethod
    def _post(path, body):
        response = requests.post(f"{DEFAULT_URL_FOR_TEST}/{path}", json=body)
        response.raise_for_status()
        return response.json()

    def test_weights_are_the_same(self):
        self.assertTrue(self.stock["checksums"])
        self.assertEqual(self.streamed["checksums"], self.stock["checksums"])

    def test_tokens_are_the_same(self):
        self.assertEqual(self.streamed["tokens"], self.stock["tokens"])

    def test_peak_memory(self):
        self.assertLessEqual(self.streamed["peak"], 1.05 * self.streamed["final"])
        self.assertGreater(self.stock["peak"], 1.3 * self.stock["final"])

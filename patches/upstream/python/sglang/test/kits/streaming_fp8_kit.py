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
MEMORY_LOG = r"to fp8 while loading.* peak ([\d.]+) GiB, final ([\d.]+) GiB"


class StreamingFp8Mixin:
    """Loads ``model``, which a subclass names, with and without streaming."""

    # Of the load's peak memory to what it leaves
    max_peak_ratio = 1.05

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
            process.wait(timeout=60)
        memory = re.search(MEMORY_LOG, out.getvalue() + err.getvalue())
        checksums = [rank["checksums"] for rank in checked["ranks"]]
        return {"tokens": tokens, "checksums": checksums, "memory": memory}

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
        self.assertIsNone(self.stock["memory"], "it streams without being asked")
        peak, final = map(float, self.streamed["memory"].groups())
        self.assertLessEqual(peak, self.max_peak_ratio * final)

import threading
import unittest

import torch

from sglang.srt.layers.quantization.streaming_fp8.capture import (
    WriteCapture,
    storage_key,
)
from sglang.srt.layers.quantization.streaming_fp8.errors import (
    ConflictingWriteError,
    UnsupportedDtypeError,
)
from sglang.srt.layers.quantization.streaming_fp8.quantizer import assemble
from sglang.srt.layers.quantization.streaming_fp8.staging import StagingAccount
from sglang.srt.layers.quantization.streaming_fp8.stream import ParameterStream, Storage
from sglang.srt.layers.quantization.streaming_fp8.units import UnitGrid
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

EXPERTS, SHAPE = 4, (6, 8)


def quantize(unit):
    scale = unit.float().abs().amax() / 448
    return (unit.float() / scale).to(torch.float8_e4m3fn), scale


class Quantizer:
    def quantize(self, pieces, weight, scale):
        values, unit_scale = quantize(assemble(pieces, weight))
        weight.copy_(values)
        scale.copy_(unit_scale)

    def quantize_run(self, values, weight, scale):
        for unit in range(len(values)):
            out, scale[unit] = quantize(values[unit])
            weight[unit].copy_(out)


class TestParameterStream(CustomTestCase):
    def setUp(self):
        shape = (EXPERTS, *SHAPE)
        self.weight = torch.randn(shape).to(torch.bfloat16)
        empty = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        self.placeholder = torch.nn.Parameter(empty, requires_grad=False)
        self.storage = Storage(torch.zeros(shape, dtype=torch.float8_e4m3fn), torch.zeros(EXPERTS))
        self.account = StagingAccount()
        self.stream = ParameterStream(
            "layer.weight",
            self.placeholder,
            UnitGrid.per_slice(shape),
            Quantizer(),
            self.storage,
            self.account,
        )
        self.sinks = {storage_key(self.placeholder): self.stream}

    def load(self, loaded_weight, expert, start):
        with WriteCapture(self.sinks):
            rows = slice(start, start + len(loaded_weight))
            self.placeholder.data[expert][rows].copy_(loaded_weight)

    def _assert_quantized(self):
        for expert in range(EXPERTS):
            values, scale = quantize(self.weight[expert])
            stored = self.storage.weight[expert].view(torch.uint8)
            self.assertTrue(torch.equal(stored, values.view(torch.uint8)))
            self.assertEqual(self.storage.scale[expert], scale)

    def test_halves_in_any_order(self):
        for expert in (2, 0, 3, 1):
            self.load(self.weight[expert, 3:], expert, 3)
        self.assertEqual(self.account.held, EXPERTS * 3 * 8 * 2)
        for expert in range(EXPERTS):
            self.load(self.weight[expert, :3], expert, 0)
        self.assertEqual(self.account.held, 0)
        self.assertEqual(self.stream.settle(), [])
        self._assert_quantized()

    def test_whole_experts_are_not_staged(self):
        for expert in range(EXPERTS):
            self.load(self.weight[expert], expert, 0)
        self.assertEqual(self.account.peak, 0)
        self._assert_quantized()

    def test_threads(self):
        halves = [(e, s) for e in range(EXPERTS) for s in (0, 3)]
        threads = [
            threading.Thread(
                target=self.load,
                args=(self.weight[e, s : s + 3], e, s),
            )
            for e, s in halves
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.stream.settle(), [])
        self._assert_quantized()

    def test_missing_part_is_zero(self):
        self.weight[1:].zero_()
        self.weight[0, 3:] = 0
        self.load(self.weight[0, :3], 0, 0)
        self.assertEqual(self.stream.settle(zeros=True), [0, 1, 2, 3])
        values, _ = quantize(self.weight[0])
        stored = self.storage.weight[0].view(torch.uint8)
        self.assertTrue(torch.equal(stored, values.view(torch.uint8)))

    def test_part_that_comes_again_is_a_conflict(self):
        self.load(self.weight[0], 0, 0)
        self.load(self.weight[0, :3], 0, 0)
        with self.assertRaises(ConflictingWriteError):
            self.stream.settle()

    def test_integers_are_refused(self):
        with self.assertRaises(UnsupportedDtypeError):
            self.load(torch.ones(SHAPE, dtype=torch.int8), 0, 0)


if __name__ == "__main__":
    unittest.main()

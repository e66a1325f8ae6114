import threading
import unittest
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8 import loading
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

VALUES = torch.arange(24.0).view(4, 6).bfloat16()


def quantize(weight):
    scale = weight.float().abs().amax() / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale.view(1)


class Linear(torch.nn.Module):
    """Creates, loads and quantizes its weight as Fp8LinearMethod does."""

    def __init__(self):
        super().__init__()
        streamed = loading._current.get() is not None
        values = torch.empty(4, 6, dtype=torch.bfloat16, device="meta" if streamed else "cpu")
        self.weight = torch.nn.Parameter(values, requires_grad=False)
        self.weight.weight_loader = lambda weight, values: weight.data.copy_(values)
        if streamed:
            scale = torch.empty(1)
            weight = loading.StreamedWeight(self.weight, quantize, scale, per_expert=False)
            loading.stream_weights(self, weight=weight)

    def process(self):
        streamed = loading.finish_streaming(self)
        if streamed is None:
            values, self.scale = quantize(self.weight)
        else:
            values, self.scale = streamed["weight"].weight[0], streamed["weight"].scale
        self.weight = torch.nn.Parameter(values, requires_grad=False)


class Model(torch.nn.Module):
    def __init__(self, layer, read):
        super().__init__()
        self.layer = layer()
        self.read = read


class TestLoadStreaming(CustomTestCase):
    def _load(self, read, layer=Linear):
        """The model, and how often it was loaded."""
        loads = []

        def load():
            model = Model(layer, read)
            loads.append(model)
            with loading.streaming(model):
                self.captures = _get_current_dispatch_mode() is not None
                model.read(model.layer)
            if layer is Linear:
                model.layer.process()
            return model

        with envs.SGLANG_STREAMFP8.override(True), patch.object(loading, "_is_supported", return_value=True):
            model = loading.load_streaming(load)
        return model, len(loads)

    def _assert_loaded(self, read, loads):
        model, count = self._load(read)
        values, scale = quantize(VALUES)
        self.assertEqual(count, loads)
        self.assertTrue(torch.equal(model.layer.weight.view(torch.uint8), values.view(torch.uint8)))
        self.assertEqual(model.layer.scale, scale)

    def test_loaders_of_other_threads_are_captured(self):
        def read(layer):
            halves = [(layer.weight[:2], VALUES[:2]), (layer.weight[2:], VALUES[2:])]
            loader = layer.weight.weight_loader
            threads = [threading.Thread(target=loader, args=half) for half in halves]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        self._assert_loaded(read, 1)

    def test_what_cannot_be_streamed_is_loaded_again(self):
        def replaced(layer):
            layer.weight = torch.nn.Parameter(VALUES.clone(), requires_grad=False)

        def joined(layer):
            torch.cat([layer.weight, VALUES])
            layer.weight.data.copy_(VALUES)

        def assigned(layer):
            layer.weight.data = VALUES.clone()

        for read in (replaced, joined, assigned):
            with self.subTest(read.__name__), self.assertLogs(level="WARNING"):
                self._assert_loaded(read, 2)

    def test_error_that_has_another_reason_is_raised(self):
        with self.assertLogs(level="WARNING"), self.assertRaises(ZeroDivisionError):
            self._load(lambda layer: 1 / 0)

    def test_model_without_such_weights_is_left_alone(self):
        _, count = self._load(lambda layer: None, lambda: torch.nn.Linear(2, 2, device="meta"))
        self.assertEqual((count, self.captures), (1, False))


if __name__ == "__main__":
    unittest.main()

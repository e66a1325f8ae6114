import unittest

import torch

from sglang.srt.layers.quantization.streaming_fp8.capture import (
    WriteCapture,
    storage_key,
)
from sglang.srt.layers.quantization.streaming_fp8.errors import UnsupportedWriteError
from sglang.srt.layers.quantization.streaming_fp8.regions import Placement
from sglang.srt.layers.quantization.streaming_fp8.staging import (
    Piece,
    StagedUnit,
    StagingAccount,
)
from sglang.srt.layers.quantization.streaming_fp8.units import TargetRegions, UnitGrid
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="base-a-test-cpu")

SHAPE = (4, 6, 8)


class Recorder:
    """Writes what it takes into real memory, by the boxes that it finds."""

    name = "weight"

    def __init__(self, shape):
        self.values = torch.zeros(shape)
        self.boxes = []

    def write(self, destination, source):
        placement = Placement(destination, self.values.shape)
        self.boxes.append(placement.box)
        index = tuple(slice(start, stop) for start, stop in placement.box)
        self.values[index] = placement.lay_out(source)


class TestWriteCapture(CustomTestCase):
    def setUp(self):
        self.placeholder = torch.empty(SHAPE, device="meta")
        self.recorder = Recorder(SHAPE)
        self.capture = WriteCapture({storage_key(self.placeholder): self.recorder})

    def _assert_same(self, load):
        self.recorder.values.zero_()
        expected = torch.zeros(SHAPE)
        load(expected)
        with self.capture:
            load(self.placeholder)
        torch.testing.assert_close(self.recorder.values, expected, rtol=0, atol=0)

    def test_views_are_found(self):
        source = torch.arange(6.0 * 8).view(6, 8)
        self._assert_same(lambda weight: weight[2].copy_(source))
        self._assert_same(lambda weight: weight[1].t().copy_(source.t()))
        self._assert_same(lambda weight: weight[3].narrow(0, 2, 3).copy_(source[:3]))
        self._assert_same(lambda weight: weight.view(24, 8)[6:12].copy_(source))
        self._assert_same(lambda weight: weight[:2, :, 4:].copy_(source[:, 4:]))

    def test_fills_are_writes(self):
        self._assert_same(lambda weight: weight[1, 2:].zero_())
        self._assert_same(lambda weight: weight[1].__setitem__(0, 3.0))

    def test_other_changes_are_refused(self):
        with self.capture, self.assertRaises(UnsupportedWriteError):
            self.placeholder[0].add_(1)
        with self.capture, self.assertRaises(UnsupportedWriteError):
            self.placeholder[0].sum().item()
        with self.capture, self.assertRaises(UnsupportedWriteError):
            torch._foreach_copy_([self.placeholder], [torch.ones(SHAPE)])
        with self.capture, self.assertRaises(UnsupportedWriteError):
            torch.cat([self.placeholder, torch.ones(SHAPE)])
        with self.capture, self.assertRaises(UnsupportedWriteError):
            self.placeholder[:, ::2].copy_(torch.ones(4, 3, 8))

    def test_other_tensors_are_left_alone(self):
        other = torch.zeros(2)
        with self.capture:
            other.copy_(torch.ones(2))
        self.assertEqual(other.tolist(), [1, 1])
        self.assertEqual(self.recorder.boxes, [])


class TestUnits(CustomTestCase):
    def test_regions_say_which_experts_are_written(self):
        placeholder = torch.empty(SHAPE, device="meta")
        regions = TargetRegions(UnitGrid.per_slice(SHAPE))
        first, region = regions.of(placeholder[2:4, :3])
        self.assertEqual((first, region.count, region.box), (2, 2, ((0, 3), (0, 8))))
        self.assertFalse(region.is_whole)
        self.assertTrue(regions.of(placeholder[1])[1].is_whole)

    def test_last_write_wins(self):
        account = StagingAccount()
        unit = StagedUnit(account)
        unit.hold(Piece(((0, 4), (0, 8)), torch.ones(4, 8)))
        unit.overwrite(((2, 6), (0, 8)))
        unit.hold(Piece(((2, 6), (0, 8)), torch.zeros(4, 8)))
        self.assertEqual(unit.covered, 6 * 8)
        unit.release()
        self.assertEqual(account.held, 0)
        self.assertEqual(account.peak, 2 * 4 * 8 * 4)


if __name__ == "__main__":
    unittest.main()

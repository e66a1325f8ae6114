import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_overlay.observe.formats import bytes_text, count_text, seconds_text

_FACTORS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999_600, "1.00 MB"),
        (3_100_000, "3.10 MB"),
        (-3_100_000, "-3.10 MB"),
        (1_370_000_000, "1.37 GB"),
        (99_960_000_000, "100 GB"),
        (2_000_000_000_000_000, "2000 TB"),
    ],
)
def test_bytes_have_three_significant_digits_and_decimal_units(count, text):
    assert bytes_text(count) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_bytes_text_reads_back_within_its_three_digits(count):
    number, unit = bytes_text(count).split()
    assert float(number) * _FACTORS[unit] == pytest.approx(count, rel=0.0051)
    assert float(number) < 1000 or unit == "TB"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.421, "0.42 s"), (5.61, "5.6 s"), (119, "119.0 s"), (187, "3 min 07 s")]
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


def test_counts_carry_their_noun():
    assert [count_text(1, "layer"), count_text(2, "layer"), count_text(0, "entry", "entries")] == [
        "1 layer",
        "2 layers",
        "0 entries",
    ]

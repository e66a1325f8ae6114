# SPDX-License-Identifier: Apache-2.0
"""Format numbers for people, in decimal units (GB = 10**9 bytes), as for checkpoint sizes and disk quotas."""

_UNITS = ("B", "kB", "MB", "GB", "TB")
GIGABYTE = 1e9


def bytes_text(count: float) -> str:
    """``count`` bytes with three significant digits: 1 370 000 000 -> '1.37 GB', -3100000 -> '-3.10 MB'."""
    size, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        # 999.5 and above would print as 1000 of this unit instead of 1.00 of the next.
        if abs(size) < 999.5:
            break
        if unit != _UNITS[-1]:
            size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"


def seconds_text(seconds: float) -> str:
    """Seconds as '0.42 s', '5.6 s' or '3 min 07 s'."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def count_text(count: int, singular: str, plural: str | None = None) -> str:
    """``count`` with its noun: '1 layer', '2 layers'."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def ratio_text(ratio: float | None) -> str:
    """A ratio as '0.55x'; a dash for None."""
    return "-" if ratio is None else f"{ratio:.2f}x"

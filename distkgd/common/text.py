"""Numbers as people read them, and texts without their secrets."""

import re

NONE = "–"


def count_text(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def fixed(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def seconds_text(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def duration_text(seconds: float) -> str:
    """45 s, 12 min, 3.4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def size_text(value: float | None) -> str:
    """Decimal units, as a disk is sold: 1 kB is 1000 B."""
    if value is None:
        return NONE
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if round(value, 1) < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def of_bits(bits: int) -> str:
    """What stands behind a size whose numbers have few bits: " of 1 bit", " of 2 bits"; "" of 32."""
    return "" if bits == 32 else f" of {bits} bit{'s' if bits > 1 else ''}"


def redact(text: str) -> str:
    """Without the password of any URL in it."""
    return re.sub(r"(://[^/:@\s]*:)[^@/\s]+@", r"\1***@", text)

"""What a machine's processors have drawn, by the counters that Linux shows of them (RAPL)."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Counts from when it is made. The counters wrap (a busy server's within an hour), so it must be asked often.

    Counted are whole processor packages and memory where it has a domain of its own, with all that runs on them.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._seen: dict[
            Path, tuple[int, int]
        ] = {}  # counter -> what it said last, where it wraps; both in microjoules
        self._joules = 0.0
        for domain in sorted(root.glob("intel-rapl:*")):
            name = _text(domain / "name")
            counter, wraps = _number(domain / "energy_uj"), _number(domain / "max_energy_range_uj")
            if counter is not None and wraps and (name.startswith("package") or name == "dram"):
                self._seen[domain / "energy_uj"] = counter, wraps

    def joules(self) -> float | None:
        """Since this meter was made; None where the counters cannot be read (most containers, other processors)."""
        for path, (before, wraps) in self._seen.items():
            now = _number(path)
            if now is None:
                self._seen = {}
                break
            self._joules += (now - before if now >= before else now - before + wraps) / 1e6
            self._seen[path] = now, wraps
        return self._joules if self._seen else None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # a counter that only root may read is one that is not there
        return ""

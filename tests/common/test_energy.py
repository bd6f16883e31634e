"""Energy counters as Linux shows them: packages and memory, wrapping, unreadable ones."""

from pathlib import Path

from distkgd.common.energy import Meter


def domain(root: Path, name: str, kind: str, counter: int, wraps: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{counter}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_up_and_cores_are_not_counted_twice(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    cores = domain(tmp_path, "intel-rapl:0:0", "core", 500_000)
    memory = domain(tmp_path, "intel-rapl:0:1", "dram", 0)
    meter = Meter(tmp_path)
    assert meter.joules() == 0.0
    package.write_text("3500000\n")
    cores.write_text("9500000\n")
    memory.write_text("250000\n")
    assert meter.joules() == 2.75
    assert meter.joules() == 2.75


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 9_000_000, wraps=10_000_000)
    meter = Meter(tmp_path)
    package.write_text("1000000\n")
    assert meter.joules() == 2.0


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert Meter(tmp_path / "none").joules() is None
    package = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = Meter(tmp_path)
    package.unlink()
    assert meter.joules() is None and meter.joules() is None
    domain(tmp_path, "intel-rapl:0", "package-0", 1, wraps=0)
    assert Meter(tmp_path).joules() is None

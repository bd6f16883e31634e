"""constraints.txt beside what torch's builds and the installed packages require; nothing is asked of a network."""

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.launches import ROOT

# Requires-Dist of torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl, the build for CUDA, as the Python Package Index
# has it. The CPU build that most tests run with requires no triton. `make resolve` asks the indexes themselves.
RECORDED = "2.13.0"
CUDA_BUILD = """\
filelock
typing-extensions>=4.10.0
setuptools>=77.0.3
sympy>=1.13.3
networkx>=2.5.1
jinja2
fsspec>=0.8.5
cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==13.0.3; platform_system == "Linux"
cuda-bindings<14,>=13.0.3; platform_system == "Linux" and python_version < "3.15"
nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"
nvidia-cusparselt-cu13==0.8.1; platform_system == "Linux"
nvidia-nccl-cu13==2.29.7; platform_system == "Linux"
nvidia-nvshmem-cu13==3.4.5; platform_system == "Linux"
triton==3.7.1; platform_system == "Linux" and python_version < "3.15"
optree>=0.13.0; extra == "optree"
opt-einsum>=3.3; extra == "opt-einsum"
pyyaml; extra == "pyyaml"
"""  # noqa: E501


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): pinned for name, _, pinned in (line.partition("==") for line in lines if line)}


def unmet(lines: Iterable[str], pinned: dict[str, str], python: str) -> Iterator[str]:
    """Requirements that a pin breaks, on Linux and without extras."""
    machine = {"platform_system": "Linux", "sys_platform": "linux", "python_version": python, "extra": ""}
    for line in lines:
        one = Requirement(line)
        pin = pinned.get(canonicalize_name(one.name))
        if pin is None or (one.marker is not None and not one.marker.evaluate(machine)):
            continue
        if not one.specifier.contains(pin, prereleases=True):
            yield f"{line} (pinned: {pin})"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_pins_can_be_installed_with_torchs_build_for_cuda(python: str) -> None:
    assert pins()["torch"] == RECORDED, "record the requirements of this torch here"
    assert list(unmet(CUDA_BUILD.splitlines(), pins(), python)) == []
    another = pins() | {"triton": "3.9.0"}
    assert [line.partition(";")[0] for line in unmet(CUDA_BUILD.splitlines(), another, python)] == ["triton==3.7.1"]


def test_what_is_recorded_of_torch_is_what_the_installed_one_requires_too() -> None:
    if version("torch").partition("+")[0] != RECORDED:
        pytest.skip(f"torch {version('torch')} is installed, not {RECORDED}")
    recorded = {str(Requirement(line)) for line in CUDA_BUILD.splitlines()}
    assert {str(Requirement(line)) for line in requires("torch") or ()} <= recorded


def test_the_pins_agree_with_what_the_pinned_packages_require() -> None:
    known = pins()
    checked = 0
    for name, pin in known.items():
        try:
            if version(name).partition("+")[0] != pin:
                continue  # other versions are installed than the pinned ones
        except PackageNotFoundError:
            continue
        checked += 1
        assert list(unmet(requires(name) or (), known, "3.11")) == [], name
    assert checked > len(known) / 2 or version("torch").partition("+")[0] != RECORDED

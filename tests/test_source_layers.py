"""The C++ sources keep to their layers: torch in the operator's files, CUDA in device/ and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def without_comments(path: Path) -> str:
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', without_comments(path), re.MULTILINE)


NATIVE = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
TORCH = re.compile(r"(torch|ATen|c10)/")
PYTHON = re.compile(r"pybind11/|Python\.h")
CUDA = re.compile(r"(cuda\w*|cu_\w+|cuComplex|mma|cooperative_groups)\.h(pp)?|(cuda|cub|cute|thrust)/.*")
# What only device/ may say, because the simulator has to give it its meaning there.
FORBIDDEN = re.compile(
    r"\b_*asm\b|<<<|\b__constant__\b|\b__shared__\b|\b__CUDA_ARCH__\b|\b(?:thread|block)(?:Idx|Dim)\b"
)
TORCH_FILES = {
    CSRC / name
    for name in (
        *("ops.cpp", "autograd.cpp", "checks.h", "checks.cpp", "module.cpp"),
        *("device_attributes.h", "device_attributes.cpp", "cudnn_route.h", "cudnn_route.cpp"),
    )
}
PYTHON_FILES = {CSRC / name for name in ("module.cpp", "plan_module.cpp", "plan_data.h", "plan_data.cpp")}


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(CSRC)))
def test_sources_keep_to_their_layer(path: Path) -> None:
    on_device = path.parent.name == "device"
    if path not in TORCH_FILES:
        assert [name for name in includes(path) if TORCH.match(name)] == [], (
            "only the operator's own files may include torch"
        )
    if path not in PYTHON_FILES:
        assert [name for name in includes(path) if PYTHON.match(name)] == [], "Python belongs in the modules"
    if on_device:
        return
    assert [name for name in includes(path) if CUDA.fullmatch(name)] == [], "CUDA headers belong in device/"
    assert FORBIDDEN.findall(without_comments(path)) == [], (
        "goes through device/, or the simulator cannot run it"
    )


@pytest.mark.parametrize(
    "name", ["cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_runtime_api.h", "cuda/barrier", "mma.h"]
)
def test_cuda_headers_are_recognised(name: str) -> None:
    assert CUDA.fullmatch(name)


def test_own_headers_are_no_cuda_headers() -> None:
    assert [path.name for path in NATIVE if CUDA.fullmatch(path.name)] == []

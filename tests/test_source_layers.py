"""The C++ sources keep to their layers: torch in torch/, CUDA in device/, and arrows that point down."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def without_comments(path: Path) -> str:
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', without_comments(path), re.MULTILINE)


NATIVE = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
OWN_TORCH = "|".join(path.stem for path in (CSRC / "torch").iterdir())
TORCH = re.compile(rf"(ATen|c10)/|torch/(?!({OWN_TORCH})\.)")
PYTHON = re.compile(r"pybind11/|Python\.h")
CUDA = re.compile(r"(cuda\w*|cu_\w+|cuComplex|mma|cooperative_groups)\.h(pp)?|(cuda|cub|cute|thrust)/.*")
# What only device/ may say, because the simulator has to give it its meaning there.
FORBIDDEN = re.compile(
    r"\b_*asm\b|<<<|\b__constant__\b|\b__shared__\b|\b__CUDA_ARCH__\b|\b(?:thread|block)(?:Idx|Dim)\b"
)
PYTHON_FILES = {
    *(CSRC / "torch" / name for name in ("module.cpp", "arrangement.h", "arrangement.cpp")),
    *(CSRC / "plan" / name for name in ("module.cpp", "python.h", "python.cpp")),
}


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(CSRC)))
def test_sources_keep_to_their_layer(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    if folder != "torch":
        assert [name for name in includes(path) if TORCH.match(name)] == [], (
            "torch is met in csrc/torch/ alone"
        )
    if path not in PYTHON_FILES:
        assert [name for name in includes(path) if PYTHON.match(name)] == [], "Python belongs in the modules"
    if folder == "device":
        return
    assert [name for name in includes(path) if CUDA.fullmatch(name)] == [], "CUDA headers belong in device/"
    assert FORBIDDEN.findall(without_comments(path)) == [], (
        "goes through device/, or the simulator cannot run it"
    )


# What a folder's files may include of csrc/: arrows point down.
BELOW = {
    "problem.h": (),
    "args.h": ("problem.h",),
    "device": ("problem.h", "args.h", "device/"),
    "plan": ("problem.h", "args.h", "plan/", "kernels/*/tile.h", "kernels/*/layout.h"),
    "torch": ("problem.h", "args.h", "plan/", "torch/", "kernels/run.h"),
    "kernels/run": ("args.h", "plan/plan.h", "kernels/run.h"),
    "kernels/common": ("problem.h", "args.h", "device/", "kernels/common/"),
}


def own_folder(path: str) -> str:
    """The key of BELOW for a file, or the folder of its kernel."""
    parts = path.split("/")
    if path.startswith("kernels/run."):
        return "kernels/run"
    return "/".join(parts[:2]) if parts[0] == "kernels" else parts[0]


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(CSRC)))
def test_arrows_point_down(path: Path) -> None:
    folder = own_folder(str(path.relative_to(CSRC)))
    # a kernel's own folder knows its own files, what all kernels share, and, on the host's side, the plan
    allowed = BELOW.get(
        folder, (f"{folder}/", *BELOW["kernels/common"], *(("plan/",) if path.suffix != ".h" else ()))
    )
    own = [name for name in includes(path) if (CSRC / name).exists()]
    assert [name for name in own if not any(fnmatch(name, f"{each}*") for each in allowed)] == []
    if path.name in ("kernel.cuh", "operands.cuh"):
        assert not [name for name in own if name.startswith("plan/")], "a kernel knows no plan"


@pytest.mark.parametrize(
    "name", ["cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_runtime_api.h", "cuda/barrier", "mma.h"]
)
def test_cuda_headers_are_recognised(name: str) -> None:
    assert CUDA.fullmatch(name)


def test_own_headers_are_no_cuda_headers() -> None:
    assert [path.name for path in NATIVE if CUDA.fullmatch(path.name)] == []

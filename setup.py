"""Builds fused_cna: with its CUDA extension where nvcc and a CUDA build of torch are, else for the CPU alone.

Environment variables:
    FUSED_CNA_CUDA        0: no extension. 1: an error where it cannot be built. Unset: built where it can be.
    TORCH_CUDA_ARCH_LIST  architectures as torch writes them ("8.0+PTX;9.0"). Unset: those of this machine's
                          GPUs, or cuda_build.PORTABLE where it has none.
    CUDA_HOME             the CUDA toolkit. Unset: that of the nvcc on PATH.
    MAX_JOBS              compilers at a time. Unset: ninja's default.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip runs this file without its folder there

import cuda_build

CXX_FLAGS = ["-O2", "-g0", "-std=c++20", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--expt-relaxed-constexpr"]
CSRC = Path("csrc")  # relative, as setuptools wants sources
INCLUDE = str(CSRC.absolute())  # absolute, because ninja compiles in another folder


def planner() -> list[Extension]:
    """fused_cna._plan: plain C++, built wherever there is a compiler; without it nothing can be explained."""
    headers = cuda_build.pybind11_headers()
    if headers is None:
        print("fused_cna: without pybind11 at build time fused_cna.explain will not work", file=sys.stderr)
        return []
    sources = sorted(str(path) for path in [*CSRC.glob("plan/*.cpp"), *CSRC.glob("kernels/*/plan.cpp")])
    cxx = {"include_dirs": [INCLUDE, headers], "extra_compile_args": CXX_FLAGS, "language": "c++"}
    return [Extension("fused_cna._plan", sources, optional=True, **cxx)]


def with_cuda(record: dict[str, Any]) -> dict[str, Any]:
    """What setup() takes to build the planner and fused_cna._C: all of csrc but the planner's own module."""
    cuda_build.put_ninja_on_path()
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # One folder for every way of installing, so that each recompiles only what changed.
            self.build_temp = f"build/torch-{record['torch']}-{sys.implementation.cache_tag}"
            # setuptools does not notice a change of a header or of the architectures; ninja, if asked, does.
            self.force = True

        def run(self) -> None:
            super().run()
            cuda_build.write_record(record, self)

    sources = sorted(map(str, {*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")} - {CSRC / "plan" / "module.cpp"}))
    hopper = ["-DFUSED_CNA_HAS_SM90A"] if "sm_90a" in record["architectures"] else []
    # Every driver for CUDA 13 can unpack this; some for CUDA 12 cannot.
    packed = ["-compress-mode=size"] if int(record["cuda"].partition(".")[0]) >= 13 else []
    flags = {
        "cxx": [*CXX_FLAGS, *hopper],
        "nvcc": [*NVCC_FLAGS, *packed, *map(cuda_build.gencode, record["architectures"])],
    }
    kernels = CUDAExtension("fused_cna._C", sources, include_dirs=[INCLUDE], extra_compile_args=flags)
    kernels.include_dirs += cuda_build.library_headers(record)  # last: what the toolkit has comes from there
    return {"ext_modules": [kernels, *planner()], "cmdclass": {"build_ext": BuildExt}}


def for_cpu(record: dict[str, Any]) -> dict[str, Any]:
    """What setup() takes to build the planner alone."""
    print(f"fused_cna: {record['reason']}", file=sys.stderr)

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            cuda_build.write_record(record, self)

    return {"ext_modules": planner(), "cmdclass": {"build_py": BuildPy}}


cuda_build.check_setuptools()
decision = cuda_build.decide()
setup(**(with_cuda(decision) if decision["extension"] else for_cpu(decision)))

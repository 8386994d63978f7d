"""Whether setup.py builds the CUDA extension, against what and for which GPUs, and the record of that.

It reads FUSED_CNA_CUDA, TORCH_CUDA_ARCH_LIST and CUDA_HOME; setup.py says what they mean. torch is imported
only where it is asked, because a build that pip isolates has none and makes a package for the CPU.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PORTABLE = "8.0+PTX;9.0"
"""Machine code for 8.x and 9.0, and PTX for newer GPUs: that of 8.0, as what the kernels do beyond it is for
9.0 alone, and PTX of 9.0 would be a third compilation of every kernel."""

HOW_TO_BUILD = (
    "The CUDA extension needs a CUDA build of torch (2.11 or newer) and nvcc of the same major version, both "
    "there at build time; then, in a checkout of fused_cna: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)


class CannotBuildError(Exception):
    """The extension cannot be built here; the message says why."""


def output_of(*command: str) -> str:
    """What the command prints, errors included; empty where there is no such command."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace")


def architectures(arch_list: str) -> list[str]:
    """nvcc's names for a list in torch's notation: machine code as sm_80, PTX as compute_90; none below 8.0.

    9.0 becomes sm_90a, which runs on the same GPUs and has Hopper's own instructions. PTX is that of the
    plain architecture, because that of an "a" architecture runs nowhere else.
    """
    names: dict[str, None] = {}
    for entry in re.split(r"[;,\s]+", arch_list.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CannotBuildError(
                f"TORCH_CUDA_ARCH_LIST={arch_list!r} has {entry!r}, which is no architecture; "
                "give numbers as in '8.0;9.0+PTX'"
            )
        major, minor, suffix, ptx = match.groups()
        if int(major) >= 8:
            names["sm_90a" if (major, minor) == ("9", "0") else f"sm_{major}{minor}{suffix}"] = None
            if ptx:
                names[f"compute_{major}{minor}"] = None
    if not names:
        raise CannotBuildError(
            f"the kernels need compute capability 8.0 or newer, not {arch_list}; "
            "set TORCH_CUDA_ARCH_LIST to build for another machine"
        )
    return list(names)


def gencode(name: str) -> str:
    return f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}"


def machine_capabilities() -> set[str]:
    """Compute capabilities of this machine's GPUs: by the driver's tool, else by torch."""
    report = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if listed := re.findall(r"^\d+\.\d$", report, re.MULTILINE):
        return set(listed)
    from torch import cuda

    gpus = range(cuda.device_count() if cuda.is_available() else 0)
    return {"{}.{}".format(*cuda.get_device_capability(gpu)) for gpu in gpus}


def machine_arch_list(nvcc: str) -> str:
    """This machine's GPUs in torch's notation; one too new for nvcc takes PTX. PORTABLE without a GPU."""
    known = output_of(nvcc, "--list-gpu-arch").split()
    return (
        ";".join(
            c if f"compute_{c.replace('.', '')}" in known else "9.0+PTX"
            for c in sorted(machine_capabilities())
        )
        or PORTABLE
    )


def find_toolkit() -> tuple[str, str, str]:
    """Path of nvcc, the toolkit's folder, and nvcc's version."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        raise CannotBuildError(
            f"there is no nvcc in {home}/bin (CUDA_HOME)" if home else "there is no nvcc on PATH"
        )
    # nvcc may be a link or a script outside the toolkit, so only nvcc knows where the toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-c", "none.cu"), re.MULTILINE)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    if top is None or version is None:
        raise CannotBuildError(
            f"{nvcc} does not say where its toolkit is or which version it has; set CUDA_HOME"
        )
    return nvcc, os.path.realpath(top[1]), version[1]


def configure() -> dict[str, Any]:
    """What the extension is built against and for: the record that the installed package keeps."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuildError(
            f"torch could not be imported at build time ({error}), as in a build without --no-build-isolation"
        ) from error
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is a build without CUDA")
    nvcc, home, nvcc_version = find_toolkit()
    if nvcc_version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise CannotBuildError(
            f"torch {torch.__version__} is for CUDA {torch.version.cuda} and nvcc is {nvcc_version}"
        )
    os.environ["CUDA_HOME"] = home  # torch's own search would not find it behind a link
    host_compiler = output_of(os.environ.get("CXX", "c++"), "--version").partition("\n")[0]
    return {
        "extension": True,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "architectures": architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or machine_arch_list(nvcc)),
        "compiler": f"nvcc {nvcc_version}, {host_compiler}",
    }


def decide() -> dict[str, Any]:
    """The record of an extension that is to be built, or of why there is none."""
    wanted = os.environ.get("FUSED_CNA_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(
            f"FUSED_CNA_CUDA={wanted!r} has no meaning; set 0 (no extension) or 1 (insist on it), or unset it"
        )
    try:
        if wanted == "0":
            raise CannotBuildError("FUSED_CNA_CUDA=0 switched it off")
        return configure()
    except CannotBuildError as error:
        if wanted == "1":
            sys.exit(f"FUSED_CNA_CUDA=1, but the extension cannot be built: {error}. {HOW_TO_BUILD}")
        return {"extension": False, "reason": f"the extension was not built: {error}. {HOW_TO_BUILD}"}


def write_record(record: dict[str, Any], command: build_ext | build_py) -> None:
    """Leaves the record in the package that the command builds, which may be that of the checkout itself."""
    in_sources = command.editable_mode or getattr(command, "inplace", False)
    sources = command.get_finalized_command("build_py").get_package_dir("fused_cna")
    package = sources if in_sources else os.path.join(command.build_lib, "fused_cna")
    Path(package, "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pybind11_headers() -> str | None:
    """The folder of pybind11's headers, which torch brings too; None where there is neither."""
    for name in ("pybind11", "torch"):
        package = importlib.util.find_spec(name)
        if package is not None and package.origin is not None:
            return str(Path(package.origin).with_name("include"))
    return None


def library_headers(record: dict[str, Any]) -> list[str]:
    """Folders with the headers of CUDA's libraries, which torch's own include: those of its wheels, if any.

    A toolkit of the compiler alone lacks them.
    """
    import torch

    wheels = Path(torch.__file__).parents[1] / "nvidia" / f"cu{record['cuda'].split('.')[0]}" / "include"
    return [str(wheels)] if wheels.is_dir() else []


def put_ninja_on_path() -> None:
    """torch looks for ninja on PATH, where that of a virtual environment is only once it is activated."""
    if importlib.util.find_spec("ninja"):
        os.environ["PATH"] += os.pathsep + importlib.import_module("ninja").BIN_DIR


def check_setuptools() -> None:
    """Ends the build where setuptools is too old to read pyproject.toml, which would fail obscurely."""
    if int(setuptools.__version__.partition(".")[0]) < 77:
        sys.exit(
            f"setuptools {setuptools.__version__} cannot read fused_cna's pyproject.toml, "
            "which needs 77 or newer: pip install 'setuptools>=77'"
        )

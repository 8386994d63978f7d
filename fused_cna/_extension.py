"""The compiled extension ``fused_cna._C``: imported only where it was built for the torch that runs.

An extension built against another torch may crash instead of raising, so ``setup.py`` leaves ``_build.json``
beside it, which says what it was built against (or why it was not built) and is read before the import.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fused_cna._version import __version__

_RECORD = Path(__file__).with_name("_build.json")
_INSTALL = "pip install --no-build-isolation --editable ."
_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _major_minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _major(version: str) -> str:
    return version.split(".")[0]


def _mismatch(record: dict[str, Any]) -> str:
    """Why the extension of ``record`` must not be imported into this process; empty if it may be."""
    running_cuda = torch.version.cuda or "none"
    running_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    built = f"torch {record['torch']} (CUDA {record['cuda']}) for Python {record['python']}"
    running = f"torch {torch.__version__} (CUDA {running_cuda}) on Python {running_python}"
    if (
        _major_minor(record["torch"]) == _major_minor(torch.__version__)
        and _major(record["cuda"]) == _major(running_cuda)
        and record["python"] == running_python
    ):
        return ""
    return (
        f"the extension was built against {built} but {running} is running; "
        f"rebuild it in a checkout of fused_cna: {_REINSTALL}"
    )


def _load() -> tuple[dict[str, Any], ModuleType | None, str, Exception | None]:
    """The build record, the extension or None, why there is none, and the exception behind that, if any."""
    record: dict[str, Any] = {}
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
        reason = _mismatch(record) if record["extension"] else record["reason"]
    except FileNotFoundError as error:
        return (
            {},
            None,
            f"{_RECORD.parent} holds no {_RECORD.name}, so it is a source tree that was not built; "
            f"if fused_cna is installed, run outside of its checkout, else build it there: {_INSTALL}",
            error,
        )
    except (KeyError, TypeError, ValueError) as error:
        return (
            {},
            None,
            f"{_RECORD} is damaged ({error!r}); rebuild fused_cna in a checkout: {_REINSTALL}",
            error,
        )
    if reason:
        return record, None, reason, None
    try:
        return record, importlib.import_module("fused_cna._C"), "", None
    except ImportError as error:
        return (
            record,
            None,
            f"importing fused_cna._C failed ({error}); rebuild fused_cna: {_REINSTALL}",
            error,
        )


_record, _module, _reason, _cause = _load()


def is_available() -> bool:
    """Whether the compiled extension is loaded, and with it the CUDA kernels are registered."""
    return _module is not None


def unavailable_reason() -> str:
    """Why the extension is not loaded and what to do about it; empty if it is loaded."""
    return _reason


def module() -> ModuleType:
    """The extension module ``fused_cna._C``.

    Raises:
        ImportError: the extension is not loaded. Says why; the original exception is its ``__cause__``.
    """
    if _module is None:
        raise ImportError(f"fused_cna's CUDA extension is not available: {_reason}") from _cause
    return _module


def build_info() -> dict[str, Any]:
    """What this installation of fused_cna was built for and whether its CUDA kernels can be used.

    Needs no GPU. Include its answer in a bug report.

    Returns:
        A plain dict, serialisable as JSON:

        - ``version``: of fused_cna
        - ``available``: whether the extension is loaded
        - ``reason``: why not and what to do, empty if it is
        - ``torch_built``, ``cuda_built``, ``python_built``: versions it was built against, None if not built
        - ``torch_running``, ``cuda_running``, ``python_running``: versions of this process; CUDA's is torch's
          own and None in a CPU build of torch
        - ``architectures``: what the kernels were compiled for, such as ``["sm_80", "compute_80", "sm_90a"]``
          (``compute_80`` is PTX, compiled by the driver for newer GPUs)
        - ``compiler``: the compilers that built it, None if not built
        - ``kernels``: names of the kernels in the extension, empty if it is not loaded
    """
    return {
        "version": __version__,
        "available": is_available(),
        "reason": _reason,
        "torch_built": _record.get("torch"),
        "torch_running": str(torch.__version__),
        "cuda_built": _record.get("cuda"),
        "cuda_running": torch.version.cuda,
        "python_built": _record.get("python"),
        "python_running": f"{sys.version_info.major}.{sys.version_info.minor}",
        "architectures": list(_record.get("architectures", [])),
        "compiler": _record.get("compiler"),
        "kernels": list(_module.kernels()) if _module is not None else [],
    }

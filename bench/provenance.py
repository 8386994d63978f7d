"""Where a result comes from: everything needed to know whether two results may be compared."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fused_cna
from bench.setting import Setting

ROOT = Path(__file__).parents[1]
MEASURED = {"fused_cna": ".py", "csrc": ""}


def load_average() -> float | None:
    """How many processes wanted a processor in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def provenance(setting: Setting, arguments: Sequence[str], load_before: float | None) -> dict[str, Any]:
    """Device, versions, commit, date, command line and seed, ready for JSON; None for what is unknown.

    `load_before` is the load average before the run began, which tells whether other work was under way.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench", *arguments],
        "seed": setting.seed,
        "git": git_state(ROOT),
        "sources": sources_digest(ROOT),
        "host": {
            "cpu": cpu_model(),
            "machine": platform.machine(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "load_before": load_before,
        },
        "device": device_description(setting.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version_of("torchvision"),
        "timm": _version_of("timm"),
        "fused_cna": fused_cna.build_info(),
        "settings": {
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "conv_fp32_precision": torch.backends.cudnn.conv.fp32_precision,
        },
    }


def identity(content: dict[str, Any]) -> dict[str, object]:
    """What must be the same, in two provenances, for rows of both runs to stand in one result."""
    device = {f"device {name}": value for name, value in content["device"].items()}
    same = {name: content[name] for name in ("torch", "sources", "seed")}
    extension = {
        f"fused_cna {name}": content["fused_cna"].get(name)
        for name in ("available", "kernels", "architectures")
    }
    return {**device, **same, **extension, "threads": content["host"]["threads"]}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where the identities of two provenances differ: 'torch: 2.13.0 and 2.14.1'."""
    first, second = identity(before), identity(after)
    return [
        f"{name}: {first.get(name)} and {second.get(name)}"
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    ]


def sources_digest(root: Path) -> str:
    """Twelve digits that change with any source file of what is measured, committed or not."""
    digest = hashlib.sha256()
    for folder, suffix in MEASURED.items():
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.name.endswith(suffix):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_description(device: torch.device) -> dict[str, Any]:
    """Name, driver, CUDA and cuDNN versions, capability and cache of a GPU; only the kind for a CPU."""
    if device.type != "cuda":
        return {"type": device.type, "name": device_name(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": device_name(device),
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver's version."""
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def git_state(root: Path) -> dict[str, Any] | None:
    """The commit of `root` and whether files differ from it; None outside a repository or before a commit."""
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints; None where there is no such program or it fails."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout if done.returncode == 0 else None


def _version_of(module: str) -> str | None:
    loaded = sys.modules.get(module)
    return None if loaded is None else str(loaded.__version__)

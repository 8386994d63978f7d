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
from fused_cna.ops import device_obstacle

ROOT = Path(__file__).parents[1]
ON_A_CPU = (
    "On a CPU 'fused' is the eager fallback: the same PyTorch operations, so no speed-up is to be "
    "expected but of networks that are 'fused frozen'. On a GPU this run would time the CUDA kernels against "
    "every route of cuDNN."
)


def load_average() -> float | None:
    """How many processes wanted a processor in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def provenance(
    device: torch.device, arguments: Sequence[str], load_before: float | None, seed: int = 0
) -> dict[str, Any]:
    """Device, versions, commit, date, command line and seed, ready for JSON; None for what is unknown.

    `load_before` is the load average before the run began, which tells whether other work was under way.
    """
    cudnn, packages = torch.backends.cudnn, ("torchvision", "timm", "cudnn")
    loaded = {name: sys.modules.get(name) for name in packages}
    host = {"cpu": cpu_model(), "machine": platform.machine(), "system": platform.platform()}
    host |= {"threads": torch.get_num_threads(), "processors": os.cpu_count(), "load_before": load_before}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench", *arguments],
        "seed": seed,
        "git": git_state(ROOT),
        "sources": sources_digest(ROOT),
        "host": host,
        "device": device_description(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: str(module.__version__) if module else None for name, module in loaded.items()},
        "fused_cna": fused_cna.build_info(),
        "settings": {
            "cudnn_benchmark": cudnn.benchmark,
            "conv_fp32_precision": cudnn.conv.fp32_precision,
        },
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two provenances differ in what must be the same for rows of both to stand in one result."""
    first, second = (_identity(content) for content in (before, after))
    names = [name for name in dict.fromkeys((*first, *second)) if first.get(name) != second.get(name)]
    return [f"{name}: {first.get(name)} and {second.get(name)}" for name in names]


def _identity(content: dict[str, Any]) -> dict[str, object]:
    built = {name: content["fused_cna"].get(name) for name in ("available", "kernels", "architectures")}
    same = {name: content[name] for name in ("torch", "sources", "seed")}
    device = {f"device {name}": value for name, value in content["device"].items()}
    return device | same | built | {"threads": content["host"]["threads"]}


def fused_path(device: torch.device) -> tuple[bool, str]:
    """Whether the fused route runs kernels of its own on a device, and a line that says so."""
    info = fused_cna.build_info()
    if device.type != "cuda":
        return False, ON_A_CPU
    missing = "" if info["available"] else f"there is no CUDA extension: {info['reason']}"
    obstacle = missing or device_obstacle(device.index or 0)
    if obstacle:
        return False, f"'fused' is the eager fallback: {obstacle}"
    return True, f"On this GPU 'fused' runs the CUDA kernels: {', '.join(info['kernels'])}."


def sources_digest(root: Path) -> str:
    """Twelve digits that change with any source file of what is measured, committed or not."""
    digest = hashlib.sha256()
    for path in sorted((*(root / "fused_cna").rglob("*.py"), *(root / "csrc").rglob("*"))):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_description(device: torch.device) -> dict[str, Any]:
    """Name, driver, CUDA and cuDNN versions, capability and cache of a GPU; only the kind for a CPU."""
    named = {"type": device.type, "name": device_name(device)}
    if device.type != "cuda":
        return named
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return named | {
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver.splitlines()[0].strip() if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(root: Path) -> dict[str, Any] | None:
    """The commit of `root` and whether files differ from it; None outside a repository or before a commit."""
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return commit and {"commit": commit.strip(), "dirty": bool((changes or "").strip())}  # type: ignore[return-value]


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints; None where there is no such program or it fails."""
    path = shutil.which(program)
    command = [path or program, *arguments]
    if path is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout if done.returncode == 0 else None

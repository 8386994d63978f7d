"""What there is to run with: the GPU, torch, and an extension for both, which is built where it is missing.

``python -m tests.gpu.extension RESULT [--build]``; with ``--build`` it is built in any case, for sources that
changed. It takes the place of the one that .venv uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fused_cna
from fused_cna.ops import device_obstacle
from tests.gpu.evidence import write_json

ROOT = Path(__file__).resolve().parents[2]


def obstacle() -> str:
    """Why the kernels cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    return fused_cna.build_info()["reason"] or device_obstacle(0)


def show_driver() -> None:
    try:
        subprocess.run(["nvidia-smi"], timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"nvidia-smi: {error}")


def build() -> None:
    """Builds in the checkout, for this machine's GPU: setup.py finds out which that is."""
    (ROOT / ".venv" / "built").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment | {"FUSED_CNA_CUDA": "1"}, check=True)


def main(result: Path, wish: str) -> int:
    start = time.monotonic()
    show_driver()
    why_built = "asked for" if wish == "--build" else obstacle()
    if why_built and wish != "--built" and torch.cuda.is_available():
        print(f"building: {why_built}", flush=True)
        build()
        # The new one can be loaded by a new process only.
        return subprocess.run([sys.executable, "-m", __spec__.name, str(result), "--built"]).returncode
    said: dict[str, Any] = {**fused_cna.build_info(), "obstacle": obstacle()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        said["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gb": round(gpu.total_memory / 1e9, 1),
            "l2_mb": round(gpu.L2_cache_size / 1e6, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
    said |= {"built_here": wish == "--built", "check_seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(said, indent=1))
    write_json(result, said)
    return int(bool(said["obstacle"]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "".join(sys.argv[2:])))

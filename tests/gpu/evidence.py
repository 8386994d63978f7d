"""What a step leaves behind, whole whenever it is killed, and what an earlier call left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, said: object) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(said, indent=1))
    unfinished.replace(path)


def read_step(path: Path, step: str) -> dict[str, Any]:
    """The result of a step of that call; empty where there is none."""
    try:
        steps: dict[str, Any] = json.loads(path.read_text())["steps"]
    except FileNotFoundError:
        return {}
    result: dict[str, Any] = steps.get(step, {}).get("result", {})
    return result

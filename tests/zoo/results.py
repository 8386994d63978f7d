"""The results so far, a line of JSON each, kept as long as nothing that they depend on changes."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path

from tests.zoo.judge import Result

ROOT = Path(__file__).parents[2]
PATH = ROOT / "build" / "zoo" / "results.jsonl"
LIBRARIES = ("torch", "torchvision", "timm")


def versions() -> dict[str, str]:
    """The libraries' versions, without what says how torch was built."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}


def fingerprint(frozen: bool) -> str:
    """Of the sources of fused_cna and of the zoo, and of the libraries."""
    found = hashlib.sha256(f"{versions()} {frozen}".encode())
    for folder in ("fused_cna", "tests/zoo"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".txt"):
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


class Kept:
    """The results in PATH; those of other sources, or of names to `forget`, are forgotten."""

    def __init__(self, frozen: bool, forget: frozenset[str]) -> None:
        mark = fingerprint(frozen)
        lines = PATH.read_text().splitlines() if PATH.exists() else []
        # The last line is cut off where a run was killed while it wrote.
        whole = [json.loads(line) for line in lines[1:] if line.endswith("}")] if lines[:1] == [mark] else []
        self.results: dict[str, Result] = {}
        PATH.parent.mkdir(parents=True, exist_ok=True)
        PATH.write_text(f"{mark}\n")
        for one in whole:
            if one["name"] not in forget:
                self.add(Result(**one))

    def add(self, result: Result) -> None:
        self.results[result.name] = result
        with PATH.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

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
    """The results in a file; those of other sources are forgotten.

    Args:
        forget: names whose results are not wanted again.
    """

    def __init__(self, path: Path, mark: str, forget: frozenset[str] = frozenset()) -> None:
        self._path = path
        self.results: dict[str, Result] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] == mark:
            # The last line is cut off where a run was killed while it wrote.
            whole = [json.loads(line) for line in lines[1:] if line.endswith("}")]
            self.results = {one["name"]: Result(**one) for one in whole if one["name"] not in forget}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(mark + "\n" + "".join(map(_line, self.results.values())))

    def add(self, result: Result) -> None:
        self.results[result.name] = result
        with self._path.open("a") as file:
            file.write(_line(result))


def _line(result: Result) -> str:
    return json.dumps(asdict(result)) + "\n"

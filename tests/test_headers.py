"""The headers of csrc/ beside each other: one name is one thing, in every file of one program."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.simt.build import CSRC, ROOT, _common_flags, _compiler

# What needs torch stands for itself; the simulator's device/ comes first.
LIBRARIES = ("ATen", "torch", "c10", "pybind11")
HEADERS = sorted(
    str(path.relative_to(CSRC))
    for path in CSRC.rglob("*")
    if path.suffix in (".h", ".cuh")
    and path.parent.name != "device"
    and not any(f"#include <{library}/" in path.read_text() for library in LIBRARIES)
)


def compile_together(lines: list[str], folder: Path) -> str:
    """What the compiler says of one file with these lines; empty where it has nothing to say."""
    source = folder / "together.cpp"
    source.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [*_compiler(), *_common_flags(), "-fsyntax-only", str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


def test_no_two_headers_define_one_name(tmp_path: Path) -> None:
    assert len(HEADERS) > 20
    includes = [f'#include "{header}"' for header in HEADERS]
    assert compile_together(includes, tmp_path) == ""
    twice = "namespace fused_cna::grouped { class Walk {}; }"
    assert "redefinition of" in compile_together([*includes, twice], tmp_path)

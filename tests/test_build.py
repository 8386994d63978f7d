"""How fused_cna is built, packed, and loaded: cuda_build.py, setup.py, and fused_cna/_extension.py."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import cuda_build
from fused_cna import _extension
from fused_cna._version import __version__

ROOT = Path(__file__).resolve().parents[1]
TORCH = str(torch.__version__)
CUDA = torch.version.cuda or "none"
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
ARCHS = "TORCH_CUDA_ARCH_LIST"


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that decides nothing; what a test's build changes in it is undone."""
    for name in ("FUSED_CNA_CUDA", ARCHS, "CUDA_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", os.environ["PATH"])


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("8.6 8.9+PTX", ["sm_86", "sm_89", "compute_89"]),
        ("9.0;9.0a;9.0+PTX", ["sm_90a", "compute_90"]),
        ("9.0a+PTX", ["sm_90a", "compute_90"]),
        ("7.0;7.5+PTX;8.0;", ["sm_80"]),
        ("10.0a, 12.0f+PTX", ["sm_100a", "sm_120f", "compute_120"]),
        (cuda_build.PORTABLE, ["sm_80", "compute_80", "sm_90a"]),  # every GPU from 8.0 on
    ],
)
def test_architectures(arch_list: str, expected: list[str]) -> None:
    assert cuda_build.architectures(arch_list) == expected


@pytest.mark.parametrize(
    ("nvidia_smi", "gpus_of_torch", "expected"),
    [
        ("", [], cuda_build.PORTABLE),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n", [], cuda_build.PORTABLE),
        ("9.0\n", [], "9.0"),
        ("9.0\n8.0\n9.0\n", [], "8.0;9.0"),
        ("13.0\n", [], "9.0+PTX"),
        ("", [(9, 0), (8, 0), (9, 0)], "8.0;9.0"),
    ],
)
def test_default_architectures_are_those_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, nvidia_smi: str, gpus_of_torch: list[tuple[int, int]], expected: str
) -> None:
    replies = {"nvidia-smi": nvidia_smi, "nvcc": "compute_80\ncompute_90\ncompute_120\n"}
    monkeypatch.setattr(cuda_build, "output_of", lambda *command: replies[command[0]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus_of_torch))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus_of_torch))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus_of_torch.__getitem__)
    assert cuda_build.machine_arch_list("nvcc") == expected


def test_unwanted_extension_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CNA_CUDA", "0")
    record = cuda_build.decide()
    assert record["extension"] is False
    assert "FUSED_CNA_CUDA=0 switched it off" in record["reason"]


def test_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CNA_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"FUSED_CNA_CUDA='yes' has no meaning; set 0 .* or 1"):
        cuda_build.decide()


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder like that of CUDA 13.0; its nvcc, which has a link on PATH, answers questions unless MUTE."""
    nvcc, link = tmp_path / "toolkit/bin/nvcc", tmp_path / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    link.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$MUTE$1" in\n'
        f"--dryrun) echo '#$ TOP={nvcc.parent}/..' >&2; exit 1 ;;\n"
        "--version) echo 'Cuda compilation tools, release 0.0, V13.0.88' ;;\n"
        "--list-gpu-arch) echo compute_80; echo compute_90 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    link.symlink_to(nvcc)
    monkeypatch.setenv("PATH", str(link.parent), prepend=os.pathsep)
    return nvcc.parents[1]


@pytest.mark.parametrize(
    ("cuda_of_torch", "environment", "reason"),
    [
        ("no torch", {}, "torch could not be imported at build time"),
        (None, {}, f"torch {TORCH} is a build without CUDA"),
        ("13.0", {"PATH": os.devnull}, "there is no nvcc on PATH"),
        ("13.0", {"CUDA_HOME": os.devnull}, f"there is no nvcc in {os.devnull}/bin (CUDA_HOME)"),
        ("13.0", {"CUDA_HOME": "TOOLKIT", "MUTE": "1"}, "TOOLKIT/bin/nvcc does not say where its toolkit is"),
        ("12.8", {"CUDA_HOME": "TOOLKIT"}, f"torch {TORCH} is for CUDA 12.8 and nvcc is 13.0.88"),
        ("13.0", {ARCHS: "8.0;Hopper"}, f"{ARCHS}='8.0;Hopper' has 'Hopper', which is no architecture"),
        ("13.0", {ARCHS: "90"}, f"{ARCHS}='90' has '90', which is no architecture; give numbers as in '8.0;"),
        ("13.0", {ARCHS: "7.5+PTX"}, "the kernels need compute capability 8.0 or newer, not 7.5+PTX; set"),
    ],
)
def test_what_is_missing_is_recorded(
    monkeypatch: pytest.MonkeyPatch, toolkit: Path, cuda_of_torch: Any, environment: Any, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
    if cuda_of_torch == "no torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("TOOLKIT", str(toolkit)))
    reason = reason.replace("TOOLKIT", str(toolkit))
    record = cuda_build.decide()
    assert record["extension"] is False
    assert record["reason"].startswith(f"the extension was not built: {reason}")
    assert "--no-build-isolation" in record["reason"]

    monkeypatch.setenv("FUSED_CNA_CUDA", "1")
    insisted = f"FUSED_CNA_CUDA=1, but the extension cannot be built: {reason}"
    with pytest.raises(SystemExit, match=re.escape(insisted)):
        cuda_build.decide()


def test_record_of_an_extension(monkeypatch: pytest.MonkeyPatch, toolkit: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(ARCHS, "9.0")
    record = cuda_build.decide()
    assert record.pop("compiler").startswith("nvcc 13.0.88, ")
    versions = {"torch": TORCH, "cuda": "13.0", "python": MINOR}
    assert record == {"extension": True, **versions, "architectures": ["sm_90a"]}
    assert os.environ["CUDA_HOME"] == str(toolkit)


@pytest.mark.parametrize(
    ("name", "flags", "package"),
    [
        ("build_py", {}, "built/fused_cna"),
        ("build_py", {"editable_mode": True}, "fused_cna"),
        ("build_ext", {}, "built/fused_cna"),
        ("build_ext", {"editable_mode": True}, "fused_cna"),
        ("build_ext", {"inplace": True}, "fused_cna"),
    ],
)
def test_record_lies_in_the_package_that_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, flags: dict[str, bool], package: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("fused_cna", "built/fused_cna"):
        Path(folder).mkdir(parents=True)
    command: Any = setuptools.Distribution({"packages": ["fused_cna"]}).get_command_obj(name)
    vars(command).update(flags, build_lib="built")
    command.ensure_finalized()
    cuda_build.write_record({"extension": True}, command)
    (record,) = Path().rglob("_build.json")
    assert record == Path(package, "_build.json")
    assert json.loads(record.read_text()) == {"extension": True}


def test_setup_builds_all_of_csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    record = {"extension": True, "torch": TORCH, "cuda": "13.0", "architectures": ["sm_90a", "compute_90"]}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "toolkit")
    monkeypatch.setattr(cuda_build, "decide", lambda: record)
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    kernels, planner = given["ext_modules"]
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix != ".cuh"}
    of_plan = {path for path in csrc if path.startswith("csrc/plan/") or path.endswith("/plan.cpp")}
    assert set(planner.sources) == of_plan
    assert set(kernels.sources) == csrc - {"csrc/plan/module.cpp"}
    assert "csrc/plan/module.cpp" in of_plan
    assert [flag for flag in kernels.extra_compile_args["nvcc"] if "arch" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    for extension in (kernels, planner):
        assert extension.include_dirs[0] == str(ROOT / "csrc")
        objects = {Path(source).with_suffix(".o") for source in extension.sources}
        assert len(objects) == len(extension.sources), "two sources of one name in one folder share an object"

    # An editable install starts the commands anew and sends them to a folder of its own.
    distribution = setuptools.Distribution(given)
    build, command = (distribution.get_command_obj(name) for name in ("build", "build_ext"))
    command.ensure_finalized()
    distribution.reinitialize_command("build", reinit_subcommands=True)
    build.build_temp = "elsewhere"
    command.ensure_finalized()
    assert command.build_temp == f"build/torch-{TORCH}-{sys.implementation.cache_tag}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with what an earlier build may have left among them."""
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "results")
    for name in ("csrc", "fused_cna", "requirements", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("setup.py", "cuda_build.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "fused_cna" / "_C.cpython-30-x86_64-linux-gnu.so").write_bytes(b"stale")
    (folder / "fused_cna" / "_build.json").write_text('{"extension": true}')
    return folder


def pack_without_torch(checkout: Path, command: str, out: Path) -> tuple[Path, str]:
    """Packs the checkout as an isolated build does, where torch cannot be imported: the file, and the log."""
    script = (
        "import runpy, sys; sys.modules['torch'] = None;"
        # pip does not have the checkout on sys.path.
        f"sys.path[:] = [folder for folder in sys.path if folder not in ('', {str(ROOT)!r})];"
        f"sys.argv = ['setup.py', '{command}', '--dist-dir', {str(out)!r}];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (packed,) = out.iterdir()
    return packed, done.stdout


def test_wheel_without_torch_is_for_the_cpu_and_says_so(checkout: Path, tmp_path: Path) -> None:
    packed, log = pack_without_torch(checkout, "bdist_wheel", tmp_path)
    assert packed.name.startswith(f"fused_cna-{__version__}-cp"), "the planner is compiled all the same"
    with zipfile.ZipFile(packed) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        record = json.loads(wheel.read("fused_cna/_build.json"))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_cna").rglob("*.py")}
    compiled = {name for name in names if name.endswith(".so")}
    assert [name.partition(".")[0] for name in compiled] == ["fused_cna/_plan"]
    assert names - compiled == modules | {"fused_cna/py.typed", "fused_cna/_build.json"}
    assert record["extension"] is False
    assert "as in a build without --no-build-isolation" in record["reason"]
    assert f"fused_cna: {record['reason']}" in log


def test_source_archive_is_complete_and_clean(checkout: Path, tmp_path: Path) -> None:
    packed, _ = pack_without_torch(checkout, "sdist", tmp_path)
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    build = {"setup.py", "cuda_build.py", "pyproject.toml"}
    assert sources | build | {"LICENSE", "requirements/test.txt", "tests/test_build.py"} <= names
    assert not {name for name in names if name.endswith((".so", "_build.json", ".pyc"))}


WORKING = "def kernels(): return ['direct']"
UNREAD = "raise SystemExit('the extension was imported')"
REBUILD = "--force-reinstall"


def built(**changes: str) -> str:
    """A _build.json that matches this process but for the changes."""
    versions = {"torch": TORCH, "cuda": CUDA, "python": MINOR, "compiler": "nvcc 13.0.0"}
    return json.dumps({"extension": True, **versions, "architectures": ["sm_80", "compute_80"]} | changes)


# Packages by name: the _build.json, and the _C.py, which stands in for the compiled module.
USABLE = {
    "working": (built(), WORKING),
    "other_patch_release": (built(torch=".".join(TORCH.split(".")[:2]) + ".99"), WORKING),
}
# The same, with parts of the reason why it is not loaded, and the exception behind that.
UNUSABLE: dict[str, tuple[str | None, str | None, list[str], str]] = {
    "not_built": (
        None,
        UNREAD,
        ["holds no _build.json", "outside of its checkout", "pip install --no-build-isolation --editable ."],
        "FileNotFoundError",
    ),
    "cpu_install": ('{"extension": false, "reason": "no nvcc"}', UNREAD, ["no nvcc"], "None"),
    "other_torch": (built(torch="1.9+cu"), UNREAD, ["torch 1.9+cu ", f"torch {TORCH} ", REBUILD], "None"),
    "other_cuda": (built(cuda="11"), UNREAD, ["(CUDA 11)", f"(CUDA {CUDA})", REBUILD], "None"),
    "other_python": (built(python="3.2"), UNREAD, ["for Python 3.2", f"on Python {MINOR}", REBUILD], "None"),
    "damaged": ("{", UNREAD, ["_build.json is damaged", REBUILD], "JSONDecodeError"),
    "incomplete": ('{"extension": true}', UNREAD, ["_build.json is damaged", "'torch'"], "KeyError"),
    "broken": (
        built(),
        "raise ImportError('undefined symbol: _ZN3c10')",
        ["importing fused_cna._C failed", "undefined symbol: _ZN3c10"],
        "ImportError",
    ),
    "lost": (built(), None, ["No module named 'fused_cna._C'", REBUILD], "ModuleNotFoundError"),
}

DRIVER = """
import importlib, json, sys

# An editable installation of the project would find its own extension for a package that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]

def load(folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "fused_cna"]:
        del sys.modules[name]
    sys.path[0] = folder
    importlib.invalidate_caches()
    extension = importlib.import_module("fused_cna._extension")
    result = {"info": extension.build_info(), "available": extension.is_available()}
    result["reason"] = extension.unavailable_reason()
    try:
        result["module"] = extension.module().__name__
    except ImportError as error:
        result["error"] = str(error)
        result["cause"] = repr(error.__cause__)
    return result

print(json.dumps({folder: load(folder) for folder in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What fused_cna/_extension.py makes of each of these packages, all asked in one process of their own."""
    folder = tmp_path_factory.mktemp("packages")
    packages = {**USABLE, **UNUSABLE}
    for name, (record, compiled, *_) in packages.items():
        package = folder / name / "fused_cna"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for source in ("_extension.py", "_version.py"):
            shutil.copy(ROOT / "fused_cna" / source, package / source)
        if record is not None:
            (package / "_build.json").write_text(record)
        if compiled is not None:
            (package / "_C.py").write_text(compiled)
    command = [sys.executable, "-c", DRIVER, *(str(folder / name) for name in packages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {Path(path).name: outcome for path, outcome in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", USABLE)
def test_matching_extension_is_loaded(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["available"] is True
    assert outcome["reason"] == ""
    assert outcome["module"] == "fused_cna._C"
    assert outcome["info"]["kernels"] == ["direct"]
    assert outcome["info"]["architectures"] == ["sm_80", "compute_80"]


@pytest.mark.parametrize("name", UNUSABLE)
def test_reason_of_an_unusable_extension(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    *_, reasons, cause = UNUSABLE[name]
    assert outcome["available"] is False
    for reason in reasons:
        assert reason in outcome["reason"]
    assert outcome["info"]["reason"] == outcome["reason"]
    assert outcome["info"]["kernels"] == []
    assert outcome["error"] == f"fused_cna's CUDA extension is not available: {outcome['reason']}"
    assert outcome["cause"].startswith(cause)


def test_build_info_of_this_process() -> None:
    info = _extension.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == __version__
    assert info["torch_running"] == TORCH
    assert info["available"] == (info["reason"] == "")
    info["architectures"].append("changed by the caller")
    assert "changed by the caller" not in _extension.build_info()["architectures"]


def test_extension_is_there_where_it_can_be_built() -> None:
    """A build that fell back to the CPU unnoticed would skip the tests of the extension unnoticed."""
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    reason = _extension.unavailable_reason()
    if "holds no _build.json" in reason:
        pytest.skip(reason)
    assert reason == ""
    assert _extension.module().build_info()["torch"] == TORCH.split("+")[0]

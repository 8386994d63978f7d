"""The recipes of docs/serving.md, on a Ray of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.compiled_networks import randomised

pytest.importorskip("ray", reason="needs the extra: pip install 'fused_cna[serve]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 24
PATIENCE = 120  # seconds until a test gives up


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = (
            nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for c in (3, 8)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.body(y))


def transform(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((16, 16)).tobytes()), dtype=torch.uint8)
    return pixels.view(16, 16, 3).permute(2, 0, 1) / 255


def make() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    torch.manual_seed(0)
    return randomised(Net()), transform


def wait_to_be_killed(network: nn.Module, inputs: object) -> None:
    """The first of all workers to come here waits, in its first batch."""
    with contextlib.suppress(FileExistsError):
        (Path(os.environ["PIDS"]) / "victim").symlink_to(f"{os.getpid()}")
        time.sleep(PATIENCE)


def make_mortal() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """Writes down which processes load the network."""
    (Path(os.environ["PIDS"]) / f"{os.getpid()}").touch()
    network, prepare = make()
    network.register_forward_pre_hook(wait_to_be_killed)
    return network, prepare


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for i in range(IMAGES):
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def expected(folder: Path) -> dict[str, tuple[int, float]]:
    network, prepare = make()
    answers = {}
    for path in sorted(folder.glob("*.png")):
        with torch.inference_mode():
            probability, label = network(prepare(Image.open(path))[None]).softmax(1).max(1)
        answers[path.name] = (label.item(), probability.item())
    return answers


@contextlib.contextmanager
def running(recipe: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ours |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "docs" / "serving" / recipe), *arguments],
        env=os.environ | ours | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_a_batch_job_survives_the_death_of_a_worker(images: Path, tmp_path: Path) -> None:
    """One of two workers is killed in its first batch: every file once, as the plain network answers."""
    import pyarrow.parquet

    answers = expected(images)
    (images / "broken.png").write_bytes(b"no image")
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    arguments = ["--images", str(images), "--out", str(out), "--model", f"{__name__}:make_mortal"]
    arguments += ["--workers", "2", "--batch-size", "3", "--cpus", "3"]
    with running("batch.py", *arguments, PIDS=str(pids)) as process:
        # The recipe itself, both workers, and the link.
        wait_for(lambda: len(list(pids.iterdir())) == 4, process)
        before = set(pids.iterdir())
        assert not out.exists()
        os.kill(int(os.readlink(pids / "victim")), signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    assert f"{IMAGES + 1} files" in said
    assert "1 could not be decoded" in said
    assert len(set(pids.iterdir()) - before) == 1, "one process takes the place of the one killed"

    rows = pyarrow.parquet.read_table(out).to_pylist()
    found = {Path(row["path"]).name: row for row in rows}
    assert len(rows) == len(found) == IMAGES + 1
    broken = found.pop("broken.png")
    assert broken["error"]
    assert broken["label"] == -1
    for name, (label, probability) in answers.items():
        assert found[name]["label"] == label, name
        assert found[name]["probability"] == pytest.approx(probability, rel=1e-4), name


def test_concurrent_requests_get_their_own_answers(images: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"

    def ask(path: Path) -> tuple[int, float]:
        with urllib.request.urlopen(address, path.read_bytes(), timeout=PATIENCE) as answer:
            said = json.load(answer)
        return said["label"], said["probability"]

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return bool(ask(images / "00.png"))
        return False

    with running("online.py", "--port", str(port), "--model", "tests.test_serving:make") as process:
        wait_for(is_up, process)
        answers = expected(images)
        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(answers, pool.map(ask, [images / name for name in answers]), strict=True))
        for name, (label, probability) in answers.items():
            assert found[name] == (label, pytest.approx(probability, rel=1e-4)), name
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(address, b"no image", timeout=PATIENCE)

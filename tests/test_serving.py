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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fused_cna
from tests.compiled_networks import randomised

pytest.importorskip("ray", reason="needs the extra: pip install 'fused_cna[serve]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 24
PATIENCE = 300  # seconds until a test gives up


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
    assert fused_cna.report(network).is_fused
    with contextlib.suppress(FileExistsError):
        (Path(os.environ["MARKS"]) / "victim").symlink_to(f"{os.getpid()}")
        time.sleep(PATIENCE)


def make_mortal() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """Writes down which processes load the network."""
    (Path(os.environ["MARKS"]) / f"{os.getpid()}").touch()
    network, prepare = make()
    network.register_forward_pre_hook(wait_to_be_killed)
    return network, prepare


def wait_to_be_released(network: nn.Module, inputs: object) -> None:
    """A batch waits as long as there is a file "hold"."""
    assert fused_cna.report(network).is_fused
    marks = Path(os.environ["MARKS"])
    while (marks / "hold").exists():
        (marks / "held").touch()
        time.sleep(0.1)


def make_slow() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    network, prepare = make()
    network.register_forward_pre_hook(wait_to_be_released)
    return network, prepare


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A folder in which the test and the processes of Ray leave each other signs."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


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
def running(recipe: str, *arguments: str, marks: Path) -> Iterator[subprocess.Popen[str]]:
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ours |= {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "docs" / "serving" / recipe), *arguments],
        env=os.environ | ours | {"MARKS": str(marks)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
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


def test_a_batch_job_survives_the_death_of_a_worker(images: Path, marks: Path, tmp_path: Path) -> None:
    """One of two workers is killed in its first batch: every file once, as the plain network answers."""
    import pyarrow.parquet

    answers = expected(images)
    (images / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    arguments = ["--images", str(images), "--out", str(out), "--model", f"{__name__}:make_mortal"]
    arguments += ["--workers", "2", "--batch-size", "3", "--cpus", "3"]
    with running("batch.py", *arguments, marks=marks) as process:
        # The recipe itself, both workers, and the link.
        wait_for(lambda: len(list(marks.iterdir())) == 4, process)
        before = set(marks.iterdir())
        assert not out.exists()
        os.kill(int(os.readlink(marks / "victim")), signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    assert f"{IMAGES + 1} files" in said
    assert "1 could not be decoded" in said
    assert len(set(marks.iterdir()) - before) == 1, "one process takes the place of the one killed"

    rows = pyarrow.parquet.read_table(out).to_pylist()
    found = {Path(row["path"]).name: row for row in rows}
    assert len(rows) == len(found) == IMAGES + 1
    broken = found.pop("broken.png")
    assert broken["error"]
    assert broken["label"] == -1
    for name, (label, probability) in answers.items():
        assert found[name]["label"] == label, name
        assert found[name]["probability"] == pytest.approx(probability, rel=1e-4), name


def test_requests_get_their_own_answers_and_the_last_is_not_dropped(images: Path, marks: Path) -> None:
    """Concurrent requests; then one that still runs when the service is told to stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"

    def ask(path: Path) -> tuple[int, float]:
        with urllib.request.urlopen(address, path.read_bytes(), timeout=PATIENCE) as answer:
            said = json.load(answer)
        return said["label"], said["probability"]

    def refusal() -> int:
        """The status of a request without an image, 0 where nobody listens."""
        try:
            urllib.request.urlopen(address, b"no image", timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0
        raise AssertionError("a request without an image was accepted")

    arguments = ["--port", str(port), "--model", f"{__name__}:make_slow"]
    with running("online.py", *arguments, marks=marks) as process, ThreadPoolExecutor(8) as pool:
        wait_for(lambda: refusal() == 400, process)
        answers = expected(images)
        found = dict(zip(answers, pool.map(ask, [images / name for name in answers]), strict=True))
        for name, (label, probability) in answers.items():
            assert found[name] == (label, pytest.approx(probability, rel=1e-4)), name

        (marks / "hold").touch()
        last = pool.submit(ask, images / "00.png")
        wait_for((marks / "held").exists, process)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: refusal() == 404, process)  # it takes no more requests
        assert not last.done()
        (marks / "hold").unlink()
        label, probability = answers["00.png"]
        assert last.result() == (label, pytest.approx(probability, rel=1e-4))
        process.communicate(timeout=PATIENCE)

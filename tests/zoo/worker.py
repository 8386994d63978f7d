"""Processes that judge networks one after another, so that one that dies takes one network with it."""

import gc
import os
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tests.zoo.judge import Result, fuse_frozen, judge

# Seconds for one network, many times what the slowest takes.
LIMIT = 600


@dataclass
class Worker:
    """A child process, started when it is needed and again after it died."""

    frozen: bool
    process: BaseProcess | None = None

    def judge(self, name: str) -> Result:
        """What `judge` says; a child that dies or takes too long is that network's error."""
        if self.process is None:
            context = get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.frozen), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(name)
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()
            self.process.kill()
        except (EOFError, OSError):
            pass
        self.process.join()
        status, self.process = self.process.exitcode, None
        return Result(name, error=f"the process ended with status {status} (memory, or {LIMIT} s?)")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()


def _serve(pipe: Connection, frozen: bool) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What libraries print would disturb the progress.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(judge(name, frozen=fuse_frozen if frozen else None))
        # Networks are full of cycles, and some are gigabytes.
        gc.collect()

"""Runs of `train` in processes of their own, killed or not; a script, since forks need a fresh one.

The libraries are imported once and every run is a fork of that state, before any thread is there.
Reads a JSON object from stdin (see `main`), writes one to stdout.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlorachat.errors import QlorachatError
from qlorachat.training.config import TrainConfig
from qlorachat.training.run import train

POLL = 0.005  # seconds


def start(settings: dict[str, Any], *, resume: bool, file_limit: int | None = None) -> int:
    """A run in a child; its process id. `file_limit`: bytes that a file of it may have."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        with Path(f"{settings['output']}.log").open("a") as log:
            console = Console(file=log)
            try:
                result = train(TrainConfig(**settings), resume=resume, console=console)
                code = 0 if result is not None and result.finished else 3
            except QlorachatError as error:
                console.print(str(error))
                code = 2
            except BaseException:
                console.print_exception()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The child's exit code; negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_begun(settings: dict[str, Any]) -> bool:
    """Whether the run has noted itself, from when on it can be resumed."""
    return (Path(settings["output"]) / "checkpoints" / "run.json").exists()


def kill_until_done(settings: dict[str, Any], chance: random.Random, longest: float) -> int:
    """One run to its end through any number of kill -9; how many there were."""
    kills = 0
    while True:
        resume = is_begun(settings)
        child = start(settings, resume=resume)
        while not resume and not is_begun(settings):
            time.sleep(POLL)
        deadline = time.monotonic() + chance.uniform(0, longest)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, "a run failed; see its log"
                return kills
            time.sleep(POLL)
        os.kill(child, signal.SIGKILL)
        wait(child)
        kills += 1


def main() -> None:
    """{"settings", "kills", "file_limit", "interrupt_after"} -> what happened."""
    asked = json.load(sys.stdin)
    settings, output = asked["settings"], asked["settings"]["output"]
    began = time.monotonic()
    child = start(settings, resume=asked.get("resume", False), file_limit=asked.get("file_limit"))
    if (seconds := asked.get("interrupt_after")) is not None:
        while not is_begun(settings):
            time.sleep(POLL)
        time.sleep(seconds)
        os.kill(child, signal.SIGINT)
    codes = [wait(child)]
    killed: list[int] = []
    longest = 1.2 * (time.monotonic() - began)
    chance = random.Random(asked.get("seed", 0))
    while sum(killed) < asked.get("kills", 0):
        settings["output"] = f"{output}-{len(killed)}"
        killed.append(kill_until_done(settings, chance, longest))
    json.dump({"codes": codes, "killed": killed}, sys.stdout)


if __name__ == "__main__":
    main()

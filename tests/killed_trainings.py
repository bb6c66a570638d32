"""A training that is killed again and again, against one that is not; as a script:
`python killed_trainings.py NAME FOLDER KILLS SEED` prints a line of JSON.

Trainings are processes forked from this one, which has imported everything and computes nothing: so a start is cheap.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_trainings import TRAININGS, prepare

from restoration.restorer_file import read_restorer
from training.loop.checkpoint import read_checkpoint
from training.loop.session import Session


def main(name: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until there were so many kills; each time that the training comes to its end, compare and begin anew."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    chance, whole, killed = random.Random(f"{name} {seed}"), folder / "whole", folder / "killed"
    assert _wait(_start(lambda: prepare(folder), folder / "log.txt")) == 0, (folder / "log.txt").read_text()
    began = time.monotonic()
    status = _wait(_start(lambda: _train(name, folder, whole), folder / "log.txt"))
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    duration = time.monotonic() - began
    done, inside, rounds, problems = 0, 0, 0, []
    while done < kills and not problems:
        rounds += 1
        output = killed / str(rounds)
        while not problems:
            process = _start(lambda output=output: _train(name, folder, output), folder / "log.txt")
            status = _kill(process, output, duration, chance) if done < kills else _wait(process)
            if status == 0:
                break
            done, inside = done + 1, inside + bool(_parts(output))
            problems += _broken(output)
            if status != -signal.SIGKILL:
                problems.append(f"status {status}: {(folder / 'log.txt').read_text()[-3000:]}")
        problems += _differences(whole, output)
    return {"kills": done, "inside": inside, "rounds": rounds, "seconds": round(duration, 1), "problems": problems}


def _train(name: str, folder: Path, output: Path) -> None:
    Session(name, TRAININGS[name](folder, output)).train()


def _start(work: Callable[[], None], log: Path) -> int:
    """A process that does it, its output in a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _kill(process: int, output: Path, duration: float, chance: random.Random) -> int:
    """Kill it at a random time, or while a file is being written; its exit status, 0 where it was done before."""
    parts = chance.randrange(1, 14) if chance.random() < 0.6 else None
    deadline, seen, present = time.monotonic() + chance.uniform(0, duration), 0, set()
    while parts is not None or time.monotonic() < deadline:
        if parts is not None:
            now = set(_parts(output))
            seen, present = seen + len(now - present), now
            if seen >= parts and now:
                break
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            break
        time.sleep(0.0003)
    os.kill(process, signal.SIGKILL)
    return _wait(process)


def _parts(output: Path) -> list[str]:
    """Files that are being written."""
    found = []
    for folder in (output, output / "kept", output / "samples"):
        if folder.is_dir():
            found += [entry.path for entry in os.scandir(folder) if entry.name.endswith(".part")]
    return found


def _broken(output: Path) -> list[str]:
    """What a kill left that looks whole and is not."""
    problems = []
    for path in output.rglob("*"):
        try:
            if path.suffix == ".pt":
                read_checkpoint(path)
            elif path.suffix == ".safetensors":
                read_restorer(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except Exception as error:
            problems.append(f"{path.name}: {error}")
    return problems


def _differences(whole: Path, killed: Path) -> list[str]:
    """What is not the same, to the bit, in two folders of runs."""
    problems = [f"left: {path}" for path in _parts(killed)]
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if _matters(path)) for run in (whole, killed)]
    if names[0] != names[1]:
        return [*problems, f"files: {names[0]} and {names[1]}"]
    for name in names[0]:
        a, b = (_contents(run / name) for run in (whole, killed))
        problems += [f"{name}: {difference}" for difference in _unequal(a, b, "")]
    return problems


def _matters(path: Path) -> bool:
    return path.suffix in (".pt", ".safetensors", ".jsonl", ".png")


def _contents(path: Path) -> Any:
    if path.suffix == ".pt":
        return read_checkpoint(path)
    if path.suffix == ".png":
        return path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        figures = [{key: value for key, value in line.items() if not key.startswith("speed/")} for line in lines]
        # the last validation may be there twice
        return [line for number, line in enumerate(figures) if line not in figures[:number]]
    file = read_restorer(path)
    training = {key: value for key, value in file.metadata.training.items() if key != "date"}
    return {"config": file.metadata.config, "training": training, "tensors": file.tensors}


def _unequal(a: Any, b: Any, where: str) -> Iterator[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{where} differs"
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _unequal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(first, second, f"{where}.{number}")
    elif a != b:
        yield f"{where}: {str(a)[:200]} and {str(b)[:200]}"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))

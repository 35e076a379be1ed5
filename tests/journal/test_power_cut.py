"""A power cut, on a block device: what was acknowledged is there, what was not is gone, and nothing is between.

The files and the store are on a file system of their own, on a loop device. The writer is stopped at a random moment and the
backing file copied: that is what the device has at that moment, without what only the page cache knows. Then somebody else
mounts the copy and starts. It does not model devices that reorder or lose what they were told to flush.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from agentd_sandbox import Refusal

from agentd.audit import Event
from tests.journal.conftest import mount
from tests.journal.test_faults import NAMES, Op, files_of, grow, opened, tree

KINDS = "write grow append overwrite sparse mmap truncate unlink rmtree mkdir rename symlink link chmod".split()
ROUNDS = 6


def shape(home: Path) -> str:
    """The tree as a line of JSON."""
    return json.dumps({name: [str(part)[:60] for part in found] for name, found in tree(home).items()}, sort_keys=True)


def write_until_killed(root: Path, seed: int) -> None:
    """Calls of random operations, one after another; says what the tree will be before each end, and that it has ended."""
    chance = random.Random(seed)
    store, _audit, journal = opened(root)
    home = root / "home"
    for n in range(1, 10_000):
        ops = [Op(chance.choice(KINDS), chance.choice(NAMES), chance.choice(NAMES)) for _ in range(chance.randint(1, 4))]
        transaction = journal.begin(f"c{n:05}", Event(kind="call.intent", call=f"c{n:05}"), [])
        files = files_of(home, transaction)
        for op in ops:
            with contextlib.suppress(OSError, Refusal):
                op.do(files, home)
        files.close()
        print("then", n, shape(home), flush=True)
        transaction.finish(Event(kind="call.end", call=f"c{n:05}"))
        print("done", n, flush=True)
    store.close()


def cut(device: Path, image: Path, seed: int, after_s: float) -> tuple[int, dict[int, str]]:
    """Returns how many calls were acknowledged, and what the tree was to be after each."""
    command = [
        sys.executable,
        "-c",
        f"from tests.journal.test_power_cut import *; write_until_killed(Path({str(device)!r}), {seed})",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline()]
        time.sleep(after_s)
        writer.send_signal(signal.SIGSTOP)
        while b"T" not in Path(f"/proc/{writer.pid}/stat").read_bytes().rpartition(b")")[2][:3]:
            time.sleep(0.001)
        subprocess.run(["cp", "--sparse=always", image, image.with_suffix(".cut")], check=True)
        writer.kill()
        said += writer.stdout.readlines()
    then: dict[int, str] = {}
    done = 0
    for line in said:
        word, _, rest = line.rstrip("\n").partition(" ")
        number, _, what = rest.partition(" ")
        if word == "then" and what:
            then[int(number)] = what
        elif word == "done":
            done = int(number)
    return done, then


def test_after_a_power_cut_files_and_log_agree(device: Path, tmp_path: Path):
    """As many ends as were acknowledged, or one more; and the files of just that many."""
    grow(device / "home")
    os.sync()
    then: dict[int, str] = {0: shape(device / "home")}
    subprocess.run(["umount", device], check=True)
    shutil.copy(tmp_path / "image", tmp_path / "fresh")
    cuts = 0
    for seed in range(ROUNDS):
        image = tmp_path / f"image{seed}"  # another one each time: somebody's namespace may hold the last mount a little longer
        shutil.copy(tmp_path / "fresh", image)
        mount(image, device)
        done, expected = cut(device, image, seed, 0.15 + 0.2 * random.Random(seed).random())
        subprocess.run(["umount", device], check=True)
        mount(image.with_suffix(".cut"), device)
        store, audit, journal = opened(device)
        try:
            cuts += bool(journal.recover())
            ended = sum(entry.body["kind"] == "call.end" for entry in audit.entries(limit=100_000))
            assert audit.verify().bad is None
            assert done <= ended <= done + 1
            assert shape(device / "home") == (then | expected)[ended]
        finally:
            store.close()
            subprocess.run(["umount", device], check=True)
            image.unlink()
            image.with_suffix(".cut").unlink()
    assert cuts > 0  # at least one was in the middle of a call

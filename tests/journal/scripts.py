"""Random shell scripts over random trees, run by the real sandbox with the real journal: afterwards nothing is left of them.

    python -m tests.journal.scripts --first 17 --count 1            seed 17 alone, all four ways
    python -m tests.journal.scripts --first 17 --count 1 --shrink   and with as few commands and paths as still fail

Each script is done and undone (and some redone and undone), rehearsed, killed with the broker and recovered, and cancelled.
Each time the tree is compared, byte for byte, with what it was before. Run by root, all of it is done as nobody.

One process forks all others and has no threads. A script's first ways are run by a worker that keeps one sandbox for all of
them; a killed one has a process, and a sandbox, of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from agentd_sandbox import Access, Job, Level, Limits, PathRule, Sandbox, SandboxFailure, probe

from agentd.audit import AuditLog, Event
from agentd.errors import AgentdError, JournalError
from agentd.journal import Journal, Keep, Selection, Transaction, Ways
from agentd.store import Store
from tests.journal.trees import Node, Snapshot, clear, compare, imagine, look, plant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from agentd_sandbox import Change

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65534
WAYS = ("undone", "rehearsed", "killed", "cancelled")
_DEADLINE_S = 30.0
_HUNG_S = 90
_RECOVERY_STEPS = 60  # of which one is the last of a recovery that is killed
_SHOWN = 5  # failures in full; the others are counted
_SHOWN_DIFFERENCES = 12
_SHOWN_LINES = 10
_MANY = 20  # scripts, of which some must have an effect

COMMANDS = r"""
mv {any} {new}
mv {any} {new}
mv {any} {directory}
mv -f {file} {file}
mv -T {directory} {directory}
rm -rf {any}
rm -rf {directory}/*
rm -f {file}
rm -r {directory}
rmdir {directory}
mkdir -p {new}/x/y
mkdir {new}
ln {file} {new}
ln -f {file} {file}
ln -s {text} {new}
ln -sfn {text} {any}
cp -a {any} {new}
cp -a {directory} {directory}
cp {file} {file}
chmod {mode} {any}
chmod {mode} {any}
chmod -R a-w {any}
chmod -R u+w {any}
touch {any}
touch {new}
touch -d '2003-04-05 06:07:08.123456789' {any}
touch -h -d '2003-04-05 06:07:08.123456789' {any}
truncate -s {size} {file}
truncate -s {size} {new}
echo new > {any}
echo more >> {file}
printf changed | dd of={file} conv=notrunc bs=1 seek={size}
dd if=/dev/zero of={new} bs=1000 count=50
sed -i s/line/LINE/ {file}
t={new}; tar cf "$t" {directory}; mkdir -p {new}; tar xf "$t"
t={new}; tar cf "$t" {any}; rm -rf {directory}; tar xf "$t"
d={directory}; chmod -R u+w "$d"; rm -rf "$d"
d={any}; chmod 755 "$d"; rm -f "$d"/*; chmod 555 "$d"
f={file}; d="${f%/*}"; chmod 755 "$d"; rm -f "$f"; chmod 555 "$d"
d={directory}; mv "$d" "$d.moved" && ln -s "$(basename "$d").moved" "$d"
d={directory}; rm -r "$d" && echo x > "$d"
f={file}; cp -p "$f" "$f.new"; mv "$f.new" "$f"
f={file}; rm -f "$f"; mkdir "$f"; echo inside > "$f/inside"
mkfifo {new}
find {directory} -type f -delete
python3 -c 'import os, sys; os.setxattr(sys.argv[1], "user.note", b"new")' {any}
"""
"""One each; a word in braces is drawn anew wherever it stands."""
_WITH_SETFATTR = "setfattr -n user.note -v new {any}\nsetfattr -x user.note {any}\n"
_SLOT = re.compile(r"\{(any|file|directory|new|text|mode|size)\}")
_MODES = ("000", "400", "444", "555", "644", "700", "755", "u+w", "a-w", "u-rwx")


# -- a case


@dataclass(frozen=True, slots=True)
class Case:
    """What one seed makes."""

    seed: int
    nodes: tuple[Node, ...]
    commands: tuple[str, ...]

    @property
    def script(self) -> str:
        return "\n".join(f"{{ {command}; }} || true" for command in self.commands)


def case_of(seed: int) -> Case:
    chance = random.Random(seed)
    nodes = imagine(chance)
    drawn = _Words(chance, nodes)
    known = (COMMANDS + (_WITH_SETFATTR if shutil.which("setfattr") else "")).strip().split("\n")
    commands = [_SLOT.sub(drawn, chance.choice(known)) for _ in range(chance.randint(1, 8))]
    return Case(seed, nodes, tuple(commands))


class _Words:
    """What stands in the place of a word in braces: mostly what is there, now and then what an earlier command has made."""

    def __init__(self, chance: random.Random, nodes: Sequence[Node]) -> None:
        self._chance = chance
        self._all = [node.path for node in nodes if node.path]
        self._files = [node.path for node in nodes if node.kind in ("file", "link")]
        self._directories = [node.path for node in nodes if node.kind == "directory"]
        self._new: list[bytes] = []

    def __call__(self, word: re.Match[str]) -> str:
        match word[1]:
            case "mode":
                return self._chance.choice(_MODES)
            case "size":
                return str(self._chance.choice((0, 1, 10, 700, 50_000, 200_000)))
            case "text":
                return shlex.quote(self._chance.choice(("nowhere", ".", *map(os.fsdecode, self._all))))
            case "new":
                return self._shown(self._made_up())
            case kind:
                return self._shown(self._chance.choice(self._those(kind)))

    def _those(self, kind: str) -> list[bytes]:
        if self._new and self._chance.random() < 0.15:
            return self._new
        return {"file": self._files, "directory": self._directories}.get(kind) or self._all or [b"none"]

    def _made_up(self) -> bytes:
        directory = self._chance.choice(self._directories)
        name = self._chance.choice((b"new", b"new 2", b"z", b"bad\xfe", b"-n", b".agentd-fedcba9876543210"))
        self._new.append(os.path.join(directory, name))
        return self._new[-1]

    @staticmethod
    def _shown(path: bytes) -> str:
        return shlex.quote("./" + os.fsdecode(path)) if path else "."


# -- one call


@dataclass(slots=True)
class Watching:
    """The recorder of a call: says what it would touch, and sets `cancelled` when it has been asked so often."""

    transaction: Transaction
    home: bytes
    cancelled: threading.Event = field(default_factory=threading.Event)
    at: int = 0
    asked: int = 0

    @property
    def mark(self) -> bytes:
        return self.transaction.mark

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes]:
        self.asked += 1
        if self.asked == self.at:
            self.cancelled.set()
        return self.transaction.before_changes(changes)


@dataclass(slots=True)
class House:
    """A store with its journal, as the daemon composes them, and a sandbox."""

    root: Path
    sandbox: Sandbox | None = None
    store: Store = field(init=False)
    audit: AuditLog = field(init=False)
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.root / "state")
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.root / "state" / "objects", Keep(low_space_bytes=0))

    def begin(self, call: str, home: Path, *, at: int = 0) -> Watching:
        path = os.fsencode(home)
        return Watching(self.journal.begin(call, _event("call.intent", call), [path]), path, at=at)

    def run(self, case: Case, home: Path, watching: Watching, deadline_s: float = _DEADLINE_S) -> str:
        """Run the script; returns what it said. Raises SandboxFailure."""
        assert self.sandbox
        arguments = {"command": case.script, "folder": str(home)}
        job = Job("shell", "run", arguments, {}, deadline_s, 1 << 20)
        scope = (PathRule(os.fsencode(home)),)
        hidden = (PathRule(os.fsencode(self.root / "state")),)
        access = Access(scope, scope, execute=(PathRule(b"/usr"), PathRule(b"/bin")), hidden=hidden)
        outcome = self.sandbox.run(job, access, watching, watching.cancelled, threading.Event())
        return outcome.error or str((outcome.result or {}).get("errors", ""))

    def end(self, watching: Watching, *, rehearsed: bool = False) -> tuple[int, str]:
        """How many paths it has changed; or why its end was refused, as it may be, and then all of it is put back."""
        call = watching.transaction.call
        finish = watching.transaction.rehearse if rehearsed else watching.transaction.finish
        try:
            return len(finish(_event("call.end", call))), ""
        except JournalError as e:
            with raising_wrong("put back as its end was refused"):
                watching.transaction.roll_back(_event("call.abort", call))
            return 0, f"{type(e).__name__} {_plain(e.message)}"

    def undoable(self, call: str) -> bool:
        """Whether the call has changed anything, as its end says."""
        ends = [entry.body for entry in self.audit.entries(call=call) if entry.body["kind"] == "call.end"]
        return bool(ends and ends[0].get("files"))

    def stands(self, call: str) -> bool:
        """Whether its end is on record, and no undoing of it."""
        kinds = [entry.body["kind"] for entry in self.audit.entries(limit=1000)]
        return "call.end" in kinds and "undo.end" not in kinds

    def close(self) -> None:
        if self.sandbox:
            self.sandbox.stop()
        self.store.close()


def _event(kind: Any, call: str) -> Event:
    return Event(kind=kind, call=call, run="r", principal="p")


def new_sandbox(folder: Path, level: Level, keep_open: tuple[int, ...] = ()) -> Sandbox:
    program = (ROOT / "tools" / "shell" / "run.py").read_bytes()
    sandbox = Sandbox({"shell": program}, folder, level, limits=Limits(), keep_open=keep_open)
    sandbox.start()
    return sandbox


# -- what went wrong


@dataclass(frozen=True, slots=True)
class Failure:
    """`kinds` are what several failures may have in common."""

    case: Case
    way: str
    stage: str
    kinds: frozenset[str]
    told: str
    errors: str = ""

    def __str__(self) -> str:
        return f"--- {self.way}: what is wrong when {self.stage}\n{self.told}"


def shown(case: Case, failures: Sequence[Failure]) -> str:
    """A case and all that is wrong with it; each line of the tree is a Node."""
    again = f"python -m tests.journal.scripts --first {case.seed} --count 1"
    script = [os.fsencode(command).decode("utf-8", "backslashreplace") for command in case.commands]
    said = next((failure.errors for failure in failures if failure.errors), "").splitlines()[:_SHOWN_LINES]
    lines = [f"=== seed {case.seed}        again: {again}", "--- the tree", *(f"  {node}" for node in case.nodes)]
    lines += ["--- the script", *(f"  {command}" for command in script)]
    lines += ["--- what it said", *(f"  {ascii(line)[1:-1]}" for line in said)] if said else []
    return "\n".join((*lines, *map(str, failures)))


class Wrong(Exception):
    """Carries a failure out of whatever was being tried."""

    def __init__(self, stage: str, kinds: Iterable[str], told: str) -> None:
        super().__init__(stage)
        self.stage, self.kinds, self.told = stage, frozenset(kinds), told


IGNORED: set[str] = set()
"""What is not compared, so that a person can look past it."""


def require_same(stage: str, before: Snapshot, home: Path) -> None:
    """Raises Wrong if the tree is another now."""
    found = [d for d in compare(before, look(os.fsencode(home))) if d.what not in IGNORED]
    if found:
        more = [f"  and {len(found) - _SHOWN_DIFFERENCES} more"] if len(found) > _SHOWN_DIFFERENCES else []
        kinds = {f"{stage}: {d.what} of {d.kind}" for d in found}
        raise Wrong(stage, kinds, "\n".join([*map(str, found[:_SHOWN_DIFFERENCES]), *more]))


@contextlib.contextmanager
def raising_wrong(stage: str) -> Iterator[None]:
    """Whatever is raised meanwhile is Wrong."""
    try:
        yield
    except Wrong:
        raise
    except AgentdError as e:
        raise Wrong(stage, [f"{stage}: {type(e).__name__} {_plain(e.message)}"], f"  {e.message}") from e
    except Exception as e:
        told = traceback.format_exc()
        raise Wrong(stage, [f"{stage}: {type(e).__name__} {_plain(str(e))}"], told) from e


def _plain(message: str) -> str:
    """Without what is another one each time: paths, calls, descriptors, how often the same is said."""
    for pattern, word in _VARYING:
        message = re.sub(pattern, word, message, flags=re.DOTALL)
    return re.sub(r"(PATH[^,;.]*)(?:[,;] \1)+", r"\1", message)[:160]


_VARYING = (
    (r"/(var|tmp|work)/.*?(?=[:;(]|$| can't| \()", "PATH"),
    (r"\.agentd-[0-9a-f]{16}", ".agentd-X"),
    (r"\b[0-9a-z]{26}\b", "CALL"),
    (r"/fd/\d+", "/fd/N"),
    (r"( \(and \d+ more\))?\. Everything", ". Everything"),
)


# -- the ways that one worker goes


@dataclass(slots=True)
class Told:
    """What a worker found out about a script: what went wrong, and what the others need to know of it."""

    failures: list[Failure] = field(default_factory=list)
    steps: int = 1
    asked: int = 1
    seconds: float = 0.1
    errors: str = ""
    changed: bool = False
    refused: str = ""
    unrehearsed: str = ""


class Steps:
    """Counts the steps of broker and journal, and may let one be the last of this process."""

    def __init__(self) -> None:
        self.count, self.last, self.armed = 0, 0, False
        sys.addaudithook(self._audit)
        fsync, write = os.fsync, Store.write

        def counted_fsync(descriptor: int) -> None:
            self.step()
            fsync(descriptor)

        def counted_write(store: Store, do: Callable[..., Any]) -> Any:
            self.step()
            result = write(store, do)
            self.step()
            return result

        os.fsync = counted_fsync  # type: ignore[assignment]
        Store.write = counted_write  # type: ignore[method-assign, assignment]

    def _audit(self, event: str, _arguments: Any) -> None:
        if self.armed and (event == "open" or event.startswith("os.")):
            self.step()

    def step(self) -> None:
        self.count += self.armed
        if self.armed and self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


class Worker:
    """Runs scripts in all ways that leave it alive, with one sandbox."""

    def __init__(self, root: Path, level: Level) -> None:
        self._root, self._steps = root, Steps()
        self._sandbox = new_sandbox(root, level)

    def serve(self, connection: Connection[Any, Any]) -> None:
        while (asked := connection.recv()) is not None:
            connection.send(self.attempt(*asked))
        self._sandbox.stop()

    def attempt(self, case: Case, ways: Sequence[str]) -> Told:
        told = Told()
        root = Path(tempfile.mkdtemp(dir=self._root))
        house = House(root, self._sandbox)
        for way, do in (("undone", self._undo), ("rehearsed", self._rehearse), ("cancelled", self._cancel)):
            home = root / way
            try:
                if way in ways:
                    plant(os.fsencode(home), case.nodes)
                    with raising_wrong(way):
                        do(case, house, home, told)
            except Wrong as e:
                told.failures.append(Failure(case, way, e.stage, e.kinds, e.told, told.errors))
        house.store.close()
        clear(os.fsencode(root))
        return told

    def _undo(self, case: Case, house: House, home: Path, told: Told) -> None:
        """Done and undone; for a third of them, that undone, and that undone."""
        before, started = look(os.fsencode(home)), time.monotonic()
        watching = house.begin("c1", home)
        with self._counting(told), raising_wrong("done"):
            told.errors = house.run(case, home, watching)
        told.asked = max(1, watching.asked)
        with self._counting(told), raising_wrong("finished"):
            files, told.refused = house.end(watching)
        told.seconds = time.monotonic() - started
        after = look(os.fsencode(home))
        told.changed = after != before
        if not files:
            require_same("refused" if told.refused else "done, and said to have changed nothing", before, home)
            return
        with self._counting(told), raising_wrong("undone"):
            undone = house.journal.undo("c1", "p")
        require_same("undone", before, home)
        if case.seed % 3 == 0:
            self._redo(house, home, undone.call, before, after)

    @staticmethod
    def _redo(house: House, home: Path, call: str, before: Snapshot, after: Snapshot) -> None:
        with raising_wrong("redone"):
            redone = house.journal.undo(call, "p")
        require_same("redone", after, home)
        with raising_wrong("undone again"):
            house.journal.undo(redone.call, "p")
        require_same("undone again", before, home)

    @contextlib.contextmanager
    def _counting(self, told: Told) -> Iterator[None]:
        """Adds the steps taken meanwhile to those of the script."""
        self._steps.count, self._steps.armed = told.steps, True
        try:
            yield
        finally:
            told.steps, self._steps.armed = self._steps.count, False

    def _rehearse(self, case: Case, house: House, home: Path, told: Told) -> None:
        """Rehearsed; a third of them applied, and that undone."""
        before = look(os.fsencode(home))
        watching = house.begin("c2", home)
        with raising_wrong("done"):
            house.run(case, home, watching)
        with raising_wrong("rehearsed"):
            files, told.unrehearsed = house.end(watching, rehearsed=True)
        require_same("rehearsed", before, home)
        if files and case.seed % 3 == 1:
            with raising_wrong("applied"):
                plan = house.journal.rollbacks.plan(Selection(calls=("c2",), rehearsed=True), Ways())
                applied = house.journal.rollbacks.apply(plan, "p")
            with raising_wrong("applied and undone"):
                try:
                    house.journal.undo(applied.call, "p")
                except JournalError as e:  # docs/journal.md says when
                    if "changed nothing" not in e.message or {d.what for d in compare(before, look(os.fsencode(home)))} - {
                        "links",
                        "holes",
                    }:
                        raise
                    return
            require_same("applied and undone", before, home)

    def _cancel(self, case: Case, house: House, home: Path, told: Told) -> None:
        """Cancelled at a change or at a moment, or timed out; then put back. One that was quicker than that is put back, too."""
        chance = random.Random(-case.seed)
        manner = chance.choice(("change", "moment", "deadline"))
        moment = chance.uniform(0, told.seconds)
        before = look(os.fsencode(home))
        watching = house.begin("c3", home, at=chance.randint(1, told.asked) if manner == "change" else 0)
        timer = threading.Timer(moment, watching.cancelled.set)
        if manner == "moment":
            timer.start()
        with contextlib.suppress(SandboxFailure):
            house.run(case, home, watching, moment if manner == "deadline" else _DEADLINE_S)
        timer.cancel()
        with raising_wrong("cancelled"):
            watching.transaction.roll_back(_event("call.abort", "c3"))
        require_same("cancelled", before, home)


# -- processes


def forked(work: Callable[[], None]) -> int:
    """A process that does it, and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def in_a_child(do: Callable[[], Any], *, may_die: bool = False) -> Any:
    """What it returned; raises the Wrong that it raised. One that hangs is killed."""
    reading, writing = os.pipe()

    def work() -> None:
        os.close(reading)
        signal.alarm(_HUNG_S)
        try:
            with raising_wrong("in a child"):
                result = do()
        except Wrong as e:
            result = Failure(Case(0, (), ()), "", e.stage, e.kinds, e.told)
        with open(writing, "wb") as file:
            pickle.dump(result, file)

    child = forked(work)
    os.close(writing)
    with open(reading, "rb") as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    result = pickle.loads(told) if told else None
    if isinstance(result, Failure):
        raise Wrong(result.stage, result.kinds, result.told)
    if os.WIFSIGNALED(status) and not may_die:
        raise Wrong("in a child", {"a process hung or died"}, f"  signal {os.WTERMSIG(status)}")
    return result


@dataclass(slots=True)
class Killed:
    """One script whose process is killed somewhere between its intent and the end of its undoing; then others recover."""

    case: Case
    root: Path
    level: Level
    told: Told
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(~self.case.seed)

    @property
    def home(self) -> Path:
        return self.root / "killed"

    def attempt(self) -> None:
        """Raises Wrong."""
        plant(os.fsencode(self.home), self.case.nodes)
        before = look(os.fsencode(self.home))
        by_step = self.chance.random() < 0.5
        last = self.chance.randint(1, self.told.steps) if by_step else 0
        delay_s = 0 if by_step else self.chance.uniform(0.001, self.told.seconds)
        in_a_child(lambda: self._play(last, delay_s), may_die=True)
        if self.chance.random() < 0.3:
            step = self.chance.randint(1, _RECOVERY_STEPS)
            in_a_child(lambda: self._recover(step), may_die=True)
        for _ in range(2):
            stands, complaints = in_a_child(self._recover)
            if complaints:
                raise Wrong("recovered", {f"recovered: {_plain(complaint)}" for complaint in complaints}, "\n".join(complaints))
        if stands:
            if (self.root / "after").exists():
                require_same("stands", pickle.loads((self.root / "after").read_bytes()), self.home)
            in_a_child(self._undo)
        require_same("killed, stood, undone" if stands else "killed", before, self.home)

    def _play(self, last: int, delay_s: float) -> None:
        house, steps = House(self.root), Steps()
        house.sandbox = new_sandbox(self.root, self.level, (house.store.lock_descriptor,))
        steps.last, steps.armed = last, True
        if delay_s:
            signal.setitimer(signal.ITIMER_REAL, delay_s)
        watching = house.begin("c1", self.home)
        house.run(self.case, self.home, watching)
        if house.end(watching)[0]:
            self._note(steps)
            with contextlib.suppress(AgentdError):  # other ways show why
                house.journal.undo("c1", "p")
        steps.armed = False
        house.close()

    def _note(self, steps: Steps) -> None:
        """What the script has left; nothing is killed meanwhile."""
        steps.armed = False
        left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
        (self.root / "noted").write_bytes(pickle.dumps(look(os.fsencode(self.home))))
        os.rename(self.root / "noted", self.root / "after")
        signal.setitimer(signal.ITIMER_REAL, left or _HUNG_S)
        steps.armed = True

    def _recover(self, last: int = 0) -> tuple[bool, list[str]]:
        """Whether the script's effect stands, and what was complained of."""
        complaints = _Complaints()
        logging.getLogger().addHandler(complaints)
        steps = Steps()
        house = House(self.root)
        steps.last, steps.armed = last, True
        with raising_wrong("recovering"):
            house.journal.recover()
        steps.armed = False
        if house.audit.verify().bad is not None:
            complaints.said.append("the chain of the log is broken")
        stands = house.stands("c1")
        house.close()
        return stands, complaints.said

    def _undo(self) -> None:
        house = House(self.root)
        if house.undoable("c1"):
            with raising_wrong("killed, stood, undone"):
                house.journal.undo("c1", "p")
        house.close()


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Crew:
    """Has scripts run: by a worker, which is replaced if it hangs or dies, and in processes that are killed."""

    def __init__(self, root: Path) -> None:
        self._root, self.level = root, probe()
        self._worker = 0
        self._connection: Connection[Any, Any] | None = None

    def attempt(self, case: Case, ways: Sequence[str] = WAYS) -> Told:
        """In these ways, beside the first, which says what the others need to know."""
        told = self._by_worker(case, [way for way in WAYS if way in ways and way != "killed"])
        if "killed" not in ways:
            return told
        root = Path(tempfile.mkdtemp(dir=self._root))
        try:
            Killed(case, root, self.level, told).attempt()
        except Wrong as e:
            told.failures.append(Failure(case, "killed", e.stage, e.kinds, e.told, told.errors))
        clear(os.fsencode(root))
        return told

    def _by_worker(self, case: Case, ways: Sequence[str]) -> Told:
        connection = self._connection = self._connection or self._hire()
        try:
            connection.send((case, ways))
            if connection.poll(_HUNG_S):
                told: Told = connection.recv()
                return told
        except (EOFError, OSError):
            pass
        self.dismiss(signal.SIGKILL)
        return Told([Failure(case, "+".join(ways), "hung or died", frozenset({"the worker hung or died"}), "")])

    def _hire(self) -> Connection[Any, Any]:
        ours, theirs = Pipe()

        def work() -> None:
            ours.close()
            Worker(self._root, self.level).serve(theirs)

        self._worker = forked(work)
        theirs.close()
        return ours

    def dismiss(self, by: signal.Signals | None = None) -> None:
        if not self._connection:
            return
        if by:
            os.kill(self._worker, by)
        else:
            self._connection.send(None)
        self._connection.close()
        self._connection = None
        os.waitpid(self._worker, 0)

    def shrink(self, failure: Failure) -> Failure:
        """The same kind of failure with as few commands and paths as can be left out one by one."""
        for _ in range(3):
            before = failure
            for n in reversed(range(len(before.case.commands))):
                commands = failure.case.commands
                failure = self._if_it_fails(failure, replace(failure.case, commands=commands[:n] + commands[n + 1 :]))
            for node in reversed(before.case.nodes[1:]):
                failure = self._if_it_fails(failure, replace(failure.case, nodes=_without(failure.case.nodes, node)))
            if failure is before:
                break
        return failure

    def _if_it_fails(self, failure: Failure, smaller: Case) -> Failure:
        found = self.attempt(smaller, ["undone", failure.way]).failures if smaller != failure.case else []
        return next((each for each in found if each.way == failure.way and each.kinds & failure.kinds), failure)


def _without(nodes: tuple[Node, ...], node: Node) -> tuple[Node, ...]:
    gone = {node.path} | {each.path for each in nodes if each.path.startswith(node.path + b"/")}
    return tuple(each for each in nodes if each.path not in gone and not (each.kind == "link" and each.text in gone))


# -- as an ordinary user


def as_nobody(arguments: Sequence[str]) -> int:
    """The same once more as nobody, with a copy of what it takes, as nobody may be shut out of this folder and its Python."""
    python = _python_for_nobody()
    if python is None:
        print("The scripts did not run as nobody: there is no Python of this version that nobody may start.")
        return 0
    with tempfile.TemporaryDirectory(prefix="scripts-", dir="/var/tmp") as name:
        copy = Path(name)
        _copy_to(copy)
        (copy / "tmp").mkdir()
        os.chown(copy / "tmp", NOBODY, NOBODY)
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": f"{copy}:{copy}/sandbox:{copy}/packages"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        line = [python, "-m", "tests.journal.scripts", *arguments, "--root", str(copy / "tmp")]
        return subprocess.run(line, env=environment, cwd=copy, **_NOBODY, check=False).returncode


_NOBODY: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
"""Becoming another user takes all capabilities away."""
_PACKAGES = "annotated_types apsw cffi _cffi_backend* cryptography idna pydantic pydantic_core typing_extensions.py typing_inspection zstandard"


def _python_for_nobody() -> str | None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (os.path.realpath(sys.executable), f"/usr/bin/{version}"):
        with contextlib.suppress(OSError):
            if subprocess.run([candidate, "-c", ""], env={}, cwd="/", **_NOBODY, check=False).returncode == 0:
                return candidate
    return None


def _copy_to(copy: Path) -> None:
    copy.chmod(0o755)
    skipped = shutil.ignore_patterns("__pycache__", "*.gguf")
    for folder in ("agentd", "sandbox", "tools/shell"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skipped)
    (copy / "tests" / "journal").mkdir(parents=True)
    for module in ("scripts.py", "trees.py"):
        shutil.copy(Path(__file__).parent / module, copy / "tests" / "journal")
    packages = Path(sys.modules["apsw"].__file__ or "").parent.parent
    for found in (found for pattern in _PACKAGES.split() for found in packages.glob(pattern)):
        if found.is_dir():
            shutil.copytree(found, copy / "packages" / found.name)
        else:
            shutil.copy2(found, copy / "packages" / found.name)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644 | path.stat().st_mode & 0o111)


# -- all of it


def main() -> NoReturn:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--count", type=int, default=20, help="how many scripts")
    options.add_argument("--ways", default=",".join(WAYS), help="some of these")
    options.add_argument("--shrink", action="store_true", help="show failures as small as they can be made")
    options.add_argument("--ignore", default="", help="what is not compared, such as mtime,links")
    options.add_argument("--each-kind", action="store_true", help="show one failure of each kind")
    options.add_argument("--root", type=Path, default=None, help="where the trees are planted")
    chosen = options.parse_args()
    if os.geteuid() == 0:
        sys.exit(as_nobody(sys.argv[1:]))
    IGNORED.update(filter(None, chosen.ignore.split(",")))
    with tempfile.TemporaryDirectory(dir=chosen.root or "/var/tmp") as root:
        sys.exit(_all(Path(root).resolve(), chosen))


def _all(root: Path, chosen: argparse.Namespace) -> int:
    crew = Crew(root)
    if not crew.level.confines:
        print("This kernel confines nothing, so no script was run.")
        return 0
    report = Report(crew, shrink=chosen.shrink, each_kind=chosen.each_kind)
    started = time.monotonic()
    for n, seed in enumerate(range(chosen.first, chosen.first + chosen.count), 1):
        case = case_of(seed)
        report.add(case, crew.attempt(case, chosen.ways.split(",")))
        if n % 50 == 0:
            print(
                f"{n} of {chosen.count} scripts, {report.failed} failed, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
            )
    report.conclude(chosen.count, time.monotonic() - started)
    crew.dismiss()
    return 0 if report.fit(chosen.count) else 1


@dataclass(slots=True)
class Report:
    """Some failures in full, and how many there are of each kind."""

    crew: Crew
    shrink: bool = False
    each_kind: bool = False
    seeds: dict[str, list[int]] = field(default_factory=dict)
    refusals: dict[str, list[int]] = field(default_factory=dict)
    failed: int = 0
    changed: int = 0

    def add(self, case: Case, told: Told) -> None:
        self.changed += told.changed
        self.failed += bool(told.failures)
        for refusal in filter(None, (told.refused, told.unrehearsed)):
            self.refusals.setdefault(refusal, []).append(case.seed)
        new = [failure for failure in told.failures if failure.kinds - self.seeds.keys()]
        for failure in told.failures:
            fresh = failure.kinds - self.seeds.keys()
            for kind in failure.kinds:
                self.seeds.setdefault(kind, []).append(case.seed)
            if self.shrink and (fresh if self.each_kind else self.failed <= _SHOWN):
                small = self.crew.shrink(replace(failure, kinds=fresh or failure.kinds))
                print(shown(small.case, [small]), flush=True)
        chosen = new if self.each_kind else told.failures if self.failed <= _SHOWN else []
        if chosen and not self.shrink:
            print(shown(case, chosen), flush=True)

    def conclude(self, count: int, seconds: float) -> None:
        print(f"{count} scripts in {seconds:.0f} s; {self.changed} changed something, {self.failed} failed.")
        for kind, seeds in sorted(self.seeds.items(), key=lambda item: -len(item[1])):
            print(f"  {len(seeds):4} x {kind}    seeds {seeds[:6]}")
        for refusal, seeds in self.refusals.items():
            print(f"  {len(seeds):4} x its end was refused, and it was put back: {refusal}    seeds {seeds[:6]}")

    def fit(self, count: int) -> bool:
        """Nothing failed, and this is no wonder: most scripts have changed something, and their end was seldom refused."""
        refused = sum(map(len, self.refusals.values()))
        return not self.failed and (count < _MANY or (self.changed > count // 2 and refused <= count // 10))


if __name__ == "__main__":
    main()

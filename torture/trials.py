"""What a task must hold to when it is stopped, failed, damaged or run twice at once, and the trials of that."""

import dataclasses
import errno
import itertools
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from torture.children import Fault, run, start, wait

PROMISES = {
    ("kill", True): "killed at every file operation",
    ("half", True): "killed in the middle of a write",
    ("signal", True): "signalled at a file operation",
    ("fail", True): "an I/O error at a file operation",
    ("full", True): "a full disk from a file operation on",
    ("nolock", True): "a file system without locks",
    ("kill", False): "killed at random times",
    ("signal", False): "signalled at random times",
}  # kind of a Fault, whether it is at an operation
OPERATIONS = 100  # about as many as a small training has
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Task:
    """A command, and what it works on.

    prepare(folder): makes what it starts from; call(): the command; again(): the same after it was stopped or failed, ending
    what that one began; outcome(folder): dict path → content of what counts, equal for equal work; whole(folder, before,
    after): complaints about a folder in which a call was stopped, `before` and `after` being outcomes; reads: patterns of the
    files that the command must not trust; costly: it starts processes of its own, which meet its Faults as well, each by its own
    count, and only a few trials are made of it.
    """

    name: str
    prepare: Callable
    call: Callable
    again: Callable
    outcome: Callable
    whole: Callable = lambda folder, before, after: []
    reads: tuple = ()
    costly: bool = False


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a call that nobody stops comes to: outcomes before and after it, its file operations in words, its seconds."""

    before: dict
    after: dict
    operations: list
    seconds: float


@dataclasses.dataclass(frozen=True)
class Trial:
    """One try of a promise by a task; call(folder) returns a list of complaints, none if the promise held."""

    promise: str
    task: str
    what: str
    call: Callable
    costly: bool = False

    @property
    def name(self):
        return f"{self.task}: {self.what}"


def empty(folder):
    """The folder, empty, without what an earlier child said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def prepared(task, folder):
    """The folder with what the task starts from."""
    task.prepare(empty(folder))
    return folder


def reference(task, folder):
    """Reference of a task; RuntimeError if it fails by itself."""
    trace, began = Path(f"{folder}.trace"), time.monotonic()
    trace.touch()
    before = task.outcome(prepared(task, folder))
    code, said = run(task.call, folder, trace=trace)
    if code:
        raise RuntimeError(f"{task.name} ends with exit code {code} by itself: {said}")
    operations = trace.read_text().replace(f"{folder}/", "").splitlines()
    return Reference(before, task.outcome(folder), operations, time.monotonic() - began)


def differences(found, expected):
    """One line for each path that is left over, missing or other in an outcome."""
    left_over = [f"{path} is left over" for path in sorted(found.keys() - expected.keys())]
    missing = [f"{path} is missing" for path in sorted(expected.keys() - found.keys())]
    return (
        left_over
        + missing
        + [f"{path} differs" for path in sorted(found.keys() & expected.keys()) if found[path] != expected[path]]
    )


def refused(code, said):
    """Complaints about a call that something kept from its work: it must say so in one line and end with exit code 2."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    complaints = [f"exit code {code}, not 2"] * (code != 2)
    complaints += [f"{len(lines)} lines of error, not one"] * (len(lines) != 1)
    return complaints + without_traceback(said)


def without_traceback(said):
    """Complaint about a traceback, with its last line."""
    return [f"a traceback: {said.strip().splitlines()[-1]}"] if "Traceback" in said else []


def ended(task, known, folder):
    """Complaints about the call that ends what was begun: it must come to what a call that nobody stopped did."""
    code, said = run(task.again, folder)
    complaints = without_traceback(said)
    if code:
        return [*complaints, f"the call after it ended with exit code {code}: {' '.join(said.split())[-300:]}"]
    return complaints + differences(task.outcome(folder), known.after)


def stopped(task, known, folder, *faults):
    """Complaints of a trial whose calls meet these Faults, one after the other, and whose last call is left alone."""
    prepared(task, folder)
    others = (2, 130) if task.costly else ()  # a process of its own was killed, or all were interrupted
    for number, fault in enumerate(faults):
        code, said = run(task.again if number else task.call, folder, fault)
        complaints = without_traceback(said)
        if fault.kind in ("kill", "half"):
            complaints += [f"exit code {code} of a killed process"] * (code not in (0, -signal.SIGKILL, *others))
        elif fault.kind == "signal":
            complaints += [f"exit code {code} after {fault}"] * (code not in (0, 128 + fault.number, -fault.number, *others))
        elif code:
            complaints += refused(code, said)
        else:
            complaints += differences(task.outcome(folder), known.after)
        complaints += task.whole(folder, known.before, known.after)
        if complaints:
            return complaints
    return ended(task, known, folder)


def at_operations(task, known, rng):
    """Trials of a task that is killed at each of its file operations, and at each either signalled or failed."""
    writes = ("write", "open", "mkdir")
    for at, operation in enumerate(known.operations):
        kill, half, full = Fault("kill", at=at), Fault("half", at=at), Fault("full", errno.ENOSPC, at)
        other = rng.choice((Fault("signal", rng.choice(SIGNALS), at), Fault("fail", errno.EIO, at)))
        faults = [kill, other, *[half] * operation.startswith("write"), *[full] * operation.startswith(writes)]
        yield from (fault_trial(task, known, [fault], operation) for fault in faults)
    yield fault_trial(task, known, [Fault("nolock", errno.ENOSYS)])


def fault_trial(task, known, faults, operation="whichever"):
    """Trial of a task whose calls meet these Faults; all are of one kind."""
    promise = PROMISES[faults[0].kind, faults[0].seconds is None]
    what = f"{', then '.join(map(str, faults))}, {operation}" if faults[0].seconds is None else ", then ".join(map(str, faults))
    return Trial(promise, task.name, what, lambda folder: stopped(task, known, folder, *faults), task.costly)


def at_times(task, known, count, rng):
    """`count` trials of a task that is killed one to three times at random, and as many of one that is signalled."""
    for _, kind in itertools.product(range(count), ("kill", "signal")):
        number, times = signal.SIGKILL if kind == "kill" else rng.choice(SIGNALS), rng.choice((1, 1, 2, 3))
        yield fault_trial(task, known, [Fault(kind, number, seconds=rng.uniform(0, known.seconds)) for _ in range(times)])


def in_processes(task, known, count, rng):
    """`count` trials of a costly task each of whose processes is killed at its own file operation of one number."""
    for _ in range(count):
        yield fault_trial(task, known, [Fault("kill", at=rng.randrange(OPERATIONS))], "of each of its processes")


DAMAGES = {
    "a flipped bit": lambda content, place, bit: content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :],
    "cut off": lambda content, place, bit: content[:place],
    "zeros": lambda content, place, bit: content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :],
}


def damaged(task, known, folder, path, damage, place, bit):
    """Complaints about a task one of whose files is damaged: refused by its name and left alone, or of no consequence."""
    file = prepared(task, folder) / path
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content, int(place * len(content)), bit))
    before = task.outcome(folder)
    code, said = run(task.call, folder)
    if code:
        complaints = refused(code, said) + differences(task.outcome(folder), before)
        return complaints + [f"{path} is not named: {said.strip()}"] * (file.name not in said)
    found, expected = (
        {name: content for name, content in outcome.items() if name != path} for outcome in (task.outcome(folder), known.after)
    )
    return without_traceback(said) + differences(found, expected)


def damages(task, known, folder, count, rng):
    """`count` trials for each file that the task reads, damaged in one of the ways there are."""
    start = prepared(task, folder)
    for path in sorted({str(path.relative_to(start)) for pattern in task.reads for path in start.glob(pattern)}):
        for number in range(count):
            damage, place, bit = list(DAMAGES)[number % len(DAMAGES)], rng.random(), rng.randrange(8)
            what = f"{path} with {damage} at {place:.6f}, bit {bit}"
            arguments = (path, damage, place, bit)
            yield Trial(
                "damaged files", task.name, what, lambda folder, arguments=arguments: damaged(task, known, folder, *arguments)
            )


def serial(first, second, folder):
    """Dict (whether the first ended well, the second) → list of the outcomes of two tasks one after the other, or one alone."""
    allowed = {(True, False): [], (False, True): []}
    for order in ((0,), (1,), (0, 1), (1, 0)):
        prepared(first, folder)
        well = [False, False]
        for number in order:
            well[number] = run((first, second)[number].call, folder)[0] == 0
        allowed.setdefault(tuple(well), []).append(first.outcome(folder))
    return allowed


def raced(first, second, allowed, folder, delay):
    """Complaints about two tasks that work in one folder at once, the second `delay` seconds later.

    Each ends well or is refused in one line, and the folder is as `serial`, called with them, allows.
    """
    prepared(first, folder)
    places = [Path(f"{folder}-{number}") for number in (1, 2)]
    pids = [start(first.call, folder, said=places[0])]
    time.sleep(delay)
    pids.append(start(second.call, folder, said=places[1]))
    codes = [wait(pid) for pid in pids]
    said = [Path(f"{place}.err").read_text(errors="replace") for place in places]
    complaints = [complaint for code, text in zip(codes, said, strict=True) if code for complaint in refused(code, text)]
    found, outcomes = first.outcome(folder), allowed.get(tuple(code == 0 for code in codes), [])
    if found not in outcomes:
        nearest = min((differences(found, outcome) for outcome in outcomes), key=len, default=["both were refused"])
        complaints.append(f"exit codes {codes}, and the folder is of neither: {', '.join(nearest)}")
    return complaints


def races(first, second, folder, count, rng):
    """`count` trials of two tasks that start from the same folder, at most as long apart as the first takes by itself."""
    seconds = reference(first, folder).seconds
    allowed = serial(first, second, folder)
    for _ in range(count):
        delay = rng.uniform(0, seconds) * rng.choice((0, 0.1, 1))
        what = f"{second.name} after {delay:.3f} s"
        yield Trial(
            "two processes at once",
            f"{first.name}, beside",
            what,
            lambda folder, delay=delay: raced(first, second, allowed, folder, delay),
        )

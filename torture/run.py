"""Stop, fail, damage and race every script that writes into a model directory, and see whether it keeps its promises.

    python torture/run.py                        # all of it
    python torture/run.py --each 1               # one of each promise and task
    python torture/run.py --only "EIO at operation 7,"    # the trials whose name has this in it, to see one again

A run that was stopped, at whatever moment and however, must end with the bits of one that was not, when the same command is
given again, with --resume where it trains. What keeps a run from its work must be said in one line, with exit code 2. A table
of the promises is printed, and every trial in which one was not held; the exit code is 1 if there is one.
"""

import collections
import functools
import gc
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from running.command_line import InputError, Parser, integer, run_script
from torture import trials
from torture.children import preloaded

AT_TIMES, COSTLY, DAMAGES, RACES = 12, 6, 6, 10  # trials of a promise and task that are drawn

everything = []  # the Trials that are tried


def planned(tasks, pairs, work, rng):
    """List of all Trials of these Tasks, and of these pairs of them that race."""
    found = []
    for number, task in enumerate(tasks):
        known = trials.reference(task, work / f"reference-{number}")
        print(f"{task.name}: {len(known.operations)} file operations, {known.seconds:.1f} s", flush=True)
        if os.environ["TORTURE_SHIM"]:
            found += trials.in_processes(task, known, COSTLY, rng) if task.costly else trials.at_operations(task, known, rng)
        found += trials.at_times(task, known, COSTLY if task.costly else AT_TIMES, rng)
        found += trials.damages(task, known, work / "damages", DAMAGES, rng)
    for first, second in pairs:
        found += trials.races(first, second, work / "races", RACES, rng)
    return found


def chosen(found, each, only, rng):
    """Those of the Trials that are asked for; each: so many of each promise and task, or of a costly task, 0: all."""
    found = [trial for trial in found if only in trial.name]
    if not each:
        return found
    groups = collections.defaultdict(list)
    for trial in found:
        groups[trial.task, not trial.costly and trial.promise].append(trial)
    return [trial for group in groups.values() for trial in rng.sample(group, min(each, len(group)))]


def try_one(work, number):
    """(number, complaints) of the Trial of that number in `everything`; its folder stays if there are complaints."""
    folder = work / f"trial-{number}"
    try:
        found = everything[number].call(folder)
    except Exception:
        found = [f"the harness failed: {traceback.format_exc()}"]
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
    return number, found


def held(asked, work, jobs):
    """Try these Trials in `jobs` processes and print what came out; returns whether every promise was held."""
    tried, kept, began = collections.Counter(), collections.Counter(), time.monotonic()
    everything[:] = asked  # forked processes know the trials by their numbers
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for number, complaints in pool.imap_unordered(functools.partial(try_one, work), range(len(asked))):
            trial = asked[number]
            tried[trial.promise] += 1
            kept[trial.promise] += not complaints
            if complaints:
                print(f"NOT HELD {trial.promise}: {trial.name}\n    {'; '.join(complaints)}", flush=True)
    width = max(map(len, tried))
    print(f"{'promise':{width}}  tries   held")
    for promise, count in tried.items():
        print(f"{promise:{width}}  {count:5}  {kept[promise]:5}")
    print(f"{'together':{width}}  {tried.total():5}  {kept.total():5}   in {time.monotonic() - began:.0f} s")
    return kept == tried


def main():
    """Try what is asked for; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--each", type=integer(0), default=0, metavar="N", help="so many trials of each promise and task (all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the trials whose name has this in it")
    parser.add_argument("--seed", type=integer(0), default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--jobs", type=integer(1), default=len(os.sched_getaffinity(0)), help="trials at once (the cores)")
    parser.add_argument("--keep", metavar="FOLDER", help="where the folders of trials that were not held stay")
    args = parser.parse_args()
    if not preloaded():
        print("no C compiler `cc`: nothing is tried at single file operations, only at times, with damage and in races")
    from torture import project

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        work = Path(args.keep or temporary).resolve()
        tasks, pairs = project.tasks(work)
        gc.freeze()  # else every child would copy what the collector touches
        found = chosen(planned(tasks, pairs, work, rng), args.each, args.only, rng)
        if not found:
            raise InputError(f"no trial has {args.only!r} in its name; without --only all are tried")
        print(f"{len(found)} trials, {args.jobs} at once", flush=True)
        well = held(found, work, args.jobs)
        gc.unfreeze()
        return 0 if well else 1


if __name__ == "__main__":
    run_script(main)

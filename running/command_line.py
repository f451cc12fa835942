"""What every script shares with the shell: one line a flag, flags that know whether they were given, errors of one line.

Scripts import this module before all others: from then on Ctrl-C, or too little memory for the imports, is one line too.
"""

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path

# Flags of any script that take less memory when they are lowered, and those that are named if they were given.
HEAVY = ("batch_size", "first_batch_size", "final_batch_size", "num_eval_batches", "n_points", "size", "jobs", "workers")
HEAVY_IF_GIVEN = ("semantics_n", "modality_n", "n_mixing_layer", "encoding_size", "hidden_size", "hidden_sizes",
                  "spare_dimensions", "whitening_pairs")  # fmt: skip
# What torch, its libraries, NumPy and the loader of libraries say of memory that they do not get, or of sizes past all bounds.
NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|ALLOC_FAILED|std::bad_alloc|can't start new thread|failed to map segment"
    "|calculation overflowed|multiplication overflow|array is too big|maximum allowed dimension|invalid storage size"
    "|overflow when unpacking|too large to convert|CUDA error: out of memory|Failed to CUDA calloc",
    re.IGNORECASE,
)


class InputError(Exception):
    """Something a user can mend: its one-line message names the thing, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser of a script: the first paragraph of its docstring describes it, the others end its help.

    recipes: dict name → dict flag → value of what --recipe sets; the help of each flag tells these values. `differs` says of
    each flag whether it may differ between the calls that work on one model directory: "call" (it is of this call alone),
    "freely" (no result depends on it; a later call keeps it unless it is given), "again" (as freely, but results depend on it);
    what is trained may not and is not in it. Its errors are one line, an InputError.
    """

    latest = None  # the Parser that was made last

    def __init__(self, documentation="", recipes=None, **options):
        description, *rest = (documentation or "").split("\n\n")  # None: python -OO drops docstrings
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False,
                            "description": description, "epilog": "\n\n".join(rest), **options})  # fmt: skip
        self.recipes, self.differs, self.given, self._section = recipes or {}, {}, set(), self
        Parser.latest = self

    def section(self, title, description=None):
        """Put the flags that follow under a title of the help."""
        self._section = self.add_argument_group(title, description)

    def flag(self, name, kind, text, default=None, differs=None, **options):
        """Add a flag; kind: bool, a tuple of choices, or a function of the text that is given."""
        destination = name.removeprefix("--").replace("-", "_")
        if differs:
            self.differs[destination] = differs
        set_by = {recipe: values[destination] for recipe, values in self.recipes.items() if destination in values}
        if set_by:
            text += f" ({', '.join(f'{recipe} {value}' for recipe, value in set_by.items())})"
        elif default not in (None, "") and kind is not bool:
            text += " (%(default)s)"
        if kind is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            options |= {"default": default}
        self._section.add_argument(name, help=text, **options)

    def names(self, *kinds):
        """Set of the flags that differ in one of these ways."""
        return {name for name, kind in self.differs.items() if kind in kinds}

    @property
    def destinations(self):
        """List of the names of all flags."""
        return [action.dest for action in self._actions if action.dest != "help"]

    @property
    def freely(self):
        """Set of the flags on which no result depends."""
        return self.names("call", "freely")

    def print_help(self, file=None):
        """Print the help; argparse's own takes no notice of a full disk."""
        print(self.format_help(), end="", file=file)

    def error(self, message):
        """Raise InputError."""
        raise InputError(f"{message} (see --help)")

    def parse(self, argv=None):
        """(args, given): the Namespace, what is not given as the recipe has it, and the set of the flags that were given."""
        absent = object()
        names = self.destinations
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        given = self.given = {name for name in names if getattr(args, name) is not absent}
        for name in set(names) - given:
            setattr(args, name, self.get_default(name))
        for name, value in self.recipes[args.recipe].items() if self.recipes else ():
            if name not in given:
                setattr(args, name, value)
        return args, given


def run_script(main):
    """Run `main` as a script and exit with what it returns, or as `report` says of what it raises."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = _code_of(main)
    except KeyboardInterrupt as error:  # before main began, or when it had ended
        with _undisturbed():
            code = report(error)
    sys.exit(code)


def _code_of(main):
    _open_streams()
    try:
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()  # a full disk or a closed pipe shows here
    except (Exception, KeyboardInterrupt) as error:
        with _undisturbed():
            code = report(error)
    return code


@contextlib.contextmanager
def _undisturbed():
    """Context that Ctrl-C does not cut short: a second one as the first is told."""
    previous = None
    with contextlib.suppress(ValueError):  # not in the main thread, which alone has the signals
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    if previous is not None:
        signal.signal(signal.SIGINT, previous)


def _open_streams():
    """Open the standard streams that the shell has closed, and have all print what their encoding lacks, as \\u03b8."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers: each takes the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # what a test has put there
            stream.reconfigure(errors="backslashreplace")


def report(error):
    """Say in one line on stderr what ended a script; returns the exit code.

    2: what a user can mend, too little memory included; 130: Ctrl-C; 141, without a word: who reads the output has closed it;
    1: anything else, a fault of the program, whose traceback comes first.
    """
    if isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 130
    elif isinstance(error, BrokenPipeError) and error.filename is None:
        message, code = "", 128 + signal.SIGPIPE
    elif is_out_of_memory(error):
        message, code = _with_less_memory(error), 2
    elif isinstance(error, (InputError, OSError)):
        message, code = message_of(error), 2
    else:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        goes_on = Parser.latest and "resume" in Parser.latest.destinations
        way_on = ", and --resume goes on from the last checkpoint" if goes_on else ""
        message, code = f"this is a fault of the program; every file that it wrote is whole{way_on}", 1
    if message:
        say_error(message)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again as it ends, and say so
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def is_out_of_memory(error):
    """Whether an exception says that memory could not be allocated, on a GPU or a CPU, by torch, its libraries or NumPy."""
    if isinstance(error, InputError):
        return False
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return named or getattr(error, "errno", None) == errno.ENOMEM or bool(NO_MEMORY.search(str(error)))


def _with_less_memory(error):
    asked = re.search(r"(?:tried to|unable to) allocate ([\d.]+ ?(?:bytes|[KMGTPE]i?B))", str(error), re.IGNORECASE)
    asked = asked and _readable(asked[1])  # "" says nothing: what was left over was too little for a small thing
    known, given = (Parser.latest.destinations, Parser.latest.given) if Parser.latest else ((), ())
    names = [name for name in HEAVY if name in known] + [name for name in HEAVY_IF_GIVEN if name in given]
    gpu = ", or stay on the CPU with --no-cuda" if "CUDA" in str(error) else ""
    flags = " or ".join(f"--{name.replace('_', '-')}" for name in names)
    cure = f"lower {flags}{gpu}" if names else "end other programs, or raise the limit (ulimit -v)"
    if "overwrite" in known and "batch_size" in known:
        cure += "; a run that has begun keeps what it is trained with, unless --overwrite starts it anew"
    return f"too little memory{f' ({asked} at once)' if asked else ''}; {cure}"


def _readable(size):
    """A size in bytes, or in another unit already, in words."""
    count = re.fullmatch(r"(\d+) ?bytes", size)
    if not count:
        return size
    return f"{int(count[1]) / 2**30:,.1f} GiB" if int(count[1]) > 2**27 else ""


def message_of(error):
    """Text for a user of an InputError, or of an OSError: a full disk, a directory that cannot be written."""
    if isinstance(error, InputError):
        return str(error)
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}; nothing that was complete has been lost"


def say_error(message):
    """Print a message as one line to stderr."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _interrupted(*_):
    say_error("interrupted")
    os._exit(130)  # not KeyboardInterrupt, of which NumPy's import makes another error


def _end_imports(kind, error, where):
    """sys.excepthook of a script: for what comes before `run_script`."""
    if is_out_of_memory(error):
        os._exit(report(error))
    sys.__excepthook__(kind, error, where)


_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and Path(_script).resolve().is_relative_to(Path(__file__).resolve().parents[1]):  # not in a program of others
    sys.excepthook = _end_imports
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def place_of(args):
    """The flags that name the model directory of a Namespace, as a shell takes them."""
    return shlex.join(["--model-dir", args.model_dir, "--model-id", args.model_id])


def integer(minimum, maximum=float("inf"), *, or_zero=False):
    """Kind of a flag: an integer of at least `minimum` and at most `maximum`, or 0 with `or_zero`."""

    def parse(text):
        value = int(text)
        if value < minimum and not (or_zero and value == 0):
            expected = f"an integer of at least {minimum}" + (", or 0" if or_zero else "")
            raise argparse.ArgumentTypeError(f"{value} is too small, expected {expected}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is too large, expected an integer of at most {maximum:,}")
        return value

    parse.__name__ = "integer"
    return parse


def number(minimum=0.0, maximum=float("inf"), *, above=False, below=False):
    """Kind of a flag: a finite number in [minimum, maximum], without the minimum if `above`, without the maximum if `below`."""

    def parse(text):
        value = float(text)
        outside = not minimum <= value <= maximum or (above and value == minimum) or (below and value == maximum)
        if outside or value == float("inf"):
            bounds = f"{'above' if above else 'of at least'} {minimum:g}"
            bounds += f" and {'below' if below else 'at most'} {maximum:g}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected a number {bounds}")
        return value

    parse.__name__ = "number"
    return parse


def layer_sizes(text):
    """Kind of a flag: the units of layers with commas between them, or "paper"."""
    if text != "paper" and min(map(int, text.split(","))) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a layer without units")
    return text

"""What every script shares with the shell: one line a flag, flags that know whether they were given, errors of one line."""

import argparse
import sys


class InputError(Exception):
    """Something a user can mend: its one-line message names the thing, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser of a script: the first paragraph of its docstring describes it, the others end its help.

    recipes: dict name → dict flag → value of what --recipe sets; the help of each flag tells these values. `differs` says of
    each flag whether it may differ between the calls that work on one model directory: "call" (it is of this call alone),
    "freely" (no result depends on it; a later call keeps it unless it is given), "again" (as freely, but results depend on it);
    what is trained may not and is not in it. Its errors are one line, an InputError.
    """

    def __init__(self, documentation="", recipes=None, **options):
        description, *rest = documentation.split("\n\n")
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False,
                            "description": description, "epilog": "\n\n".join(rest), **options})  # fmt: skip
        self.recipes, self.differs, self._section = recipes or {}, {}, self

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
        elif default is not None and kind is not bool:
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
    def freely(self):
        """Set of the flags on which no result depends."""
        return self.names("call", "freely")

    def error(self, message):
        """Raise InputError."""
        raise InputError(f"{message} (see --help)")

    def parse(self, argv=None):
        """(args, given): the Namespace, what is not given as the recipe has it, and the set of the flags that were given."""
        absent = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        given = {name for name in names if getattr(args, name) is not absent}
        for name in set(names) - given:
            setattr(args, name, self.get_default(name))
        for name, value in self.recipes[args.recipe].items() if self.recipes else ():
            if name not in given:
                setattr(args, name, value)
        return args, given


def run_script(main):
    """Run `main` as a script: what a user can mend ends as one line on stderr with exit code 2, Ctrl-C as one with 130."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        message, code = message_of(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    say_error(message)
    sys.exit(code)


def message_of(error):
    """Text for a user of an InputError, or of an OSError: a full disk, a directory that cannot be written."""
    if isinstance(error, InputError):
        return str(error)
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}; nothing that was complete has been lost"


def say_error(message):
    """Print a message as one line to stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def integer(minimum, *, or_zero=False):
    """Kind of a flag: an integer of at least `minimum`, or 0 with `or_zero`."""

    def parse(text):
        value = int(text)
        if value < minimum and not (or_zero and value == 0):
            expected = f"an integer of at least {minimum}" + (", or 0" if or_zero else "")
            raise argparse.ArgumentTypeError(f"{value} is too small, expected {expected}")
        return value

    parse.__name__ = "integer"
    return parse


def number(minimum=0.0, maximum=float("inf"), *, above=False):
    """Kind of a flag: a finite number in [minimum, maximum], or in (minimum, maximum] with `above`."""

    def parse(text):
        value = float(text)
        if not (minimum <= value <= maximum) or value == float("inf") or (above and value == minimum):
            bounds = f"{'above' if above else 'of at least'} {minimum:g}"
            bounds += f" and at most {maximum:g}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected a number {bounds}")
        return value

    parse.__name__ = "number"
    return parse

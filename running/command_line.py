"""What every script shares with the shell: flags that know whether they were given, and errors of one line."""

import argparse
import sys


class InputError(Exception):
    """Something a user can mend: its one-line message names the thing, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose result tells the flags given from the defaults."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def parse(self, argv=None):
        """(args, given): the Namespace, and the set of names of the flags that stood on the command line."""
        absent = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        given = {name for name in names if getattr(args, name) is not absent}
        for name in set(names) - given:
            setattr(args, name, self.get_default(name))
        return args, given


def run_script(main):
    """Run `main` as a script: what a user can mend ends as one line on stderr with exit code 2, Ctrl-C as one with 130."""
    try:
        sys.exit(main())
    except InputError as error:
        message, code = str(error), 2
    except OSError as error:  # a full disk, a directory that cannot be written
        place = f": {error.filename}" if error.filename else ""
        message, code = f"{error.strerror or error}{place}; nothing that was complete has been lost", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def integer(minimum, *, or_zero=False):
    """argparse type: an integer of at least `minimum`, or 0 with `or_zero`."""

    def parse(text):
        value = int(text)
        if value < minimum and not (or_zero and value == 0):
            expected = f"an integer of at least {minimum}" + (", or 0" if or_zero else "")
            raise argparse.ArgumentTypeError(f"{value} is too small, expected {expected}")
        return value

    parse.__name__ = "integer"
    return parse


def number(minimum=0.0, maximum=float("inf"), *, above=False):
    """argparse type: a finite number in [minimum, maximum], or in (minimum, maximum] with `above`."""

    def parse(text):
        value = float(text)
        if not (minimum <= value <= maximum) or value == float("inf") or (above and value == minimum):
            bounds = f"{'above' if above else 'of at least'} {minimum:g}" + (
                f" and at most {maximum:g}" if maximum < float("inf") else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected a number {bounds}")
        return value

    parse.__name__ = "number"
    return parse

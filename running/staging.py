"""Files of a model directory that appear together or not at all.

They are written into a hidden folder. Then args.json, which is replaced as a whole, names them by their digests: from that moment
on they are the model's, and are moved to their places; if the process is killed before that is done, by whoever comes next.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from running.command_line import InputError
from running.files import read_json, regular_file

STAGED = ".unfinished-evaluation"


@contextlib.contextmanager
def staged(directory):
    """Context of the hidden folder: what args.json names by the end moves to its place, all else is removed."""
    folder = directory / STAGED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        settle(directory)
        shutil.rmtree(folder, ignore_errors=True)


def settle(directory):
    """Move the files to their places that args.json names already; every reader of a model calls this first."""
    folder = Path(directory) / STAGED
    found = list(folder.iterdir()) if folder.is_dir() else []
    files = recorded(directory, "files") if found else {}
    for file in found:
        with contextlib.suppress(FileNotFoundError):  # another process has just done the same
            if digest(file) == files.get(file.name):
                os.replace(file, Path(directory) / file.name)


def recorded(directory, kind):
    """Dict name of a file → digest of the "files" or "weights" in args.json; {} if it has none, or is missing or damaged."""
    try:
        files = read_json(Path(directory) / "args.json").get(kind)
    except InputError:
        return {}
    return files if isinstance(files, dict) else {}


def is_recorded(path):
    """Whether a file of a model directory is the one whose digest args.json beside it names, or is not named there at all."""
    expected = recorded(path.parent, "files").get(path.name)
    return expected is None or digest(path) == expected


def digests(folder):
    """Dict name → digest of the files of a folder."""
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def digest(path):
    """SHA-256 of a file, as sha256sum prints it."""
    with open(regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

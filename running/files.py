"""Files that appear whole or not at all, and are read without trusting them."""

import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import tempfile
from pathlib import Path

from running.command_line import InputError

LONGEST_LINE = 2**16  # bytes of a line of text that is read: no caption or row of a table needs as many


@contextlib.contextmanager
def replaced(path, keep=None):
    """Context of a temporary path beside `path`, renamed to it once the block has ended well and the bytes are on disk.

    keep: path that the earlier file, if there is one, is renamed to before.
    An OSError that names no file, as that of a full disk, gets the name of `path`.
    """
    path = Path(path)
    try:
        descriptor, temporary = _locked_temporary(path)
    except OSError as error:
        error.filename = str(path)  # not a name that nobody knows
        raise
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        with open(temporary, "rb") as file:
            for call, argument in ((os.fsync, ()), (os.fchmod, (0o666 & ~umask,))):
                try:
                    call(file.fileno(), *argument)
                except OSError as error:  # file systems of a network or a cloud may know neither
                    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES):
                        raise
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def _locked_temporary(path):
    """(descriptor, name) of a new file for `replaced`, locked while it is open. Those of processes that were killed go."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.{8 * '?'}{glob.escape(path.suffix)}"):
        # what is not locked, on a file system that has locks, is nobody's any more
        with contextlib.suppress(OSError), open(other, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink()
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):  # else another process took it for nobody's, before it was locked
            return descriptor, temporary
        os.close(descriptor)


@contextlib.contextmanager
def locked(path):
    """Context in which no other process is in `locked` with this path; where there is no file, an empty one is left.

    Where the file cannot be made, or the file system has no locks, nothing is waited for.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(path, "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def regular_file(path):
    """Path of `path`; InputError if there is something that is no regular file: a FIFO would be waited for, for ever."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file, expected one")
    return path


def read_text(path):
    """Text of a regular file in UTF-8, without a byte order mark; InputError if a line has more than LONGEST_LINE bytes.

    Raises FileNotFoundError and UnicodeDecodeError as they come.
    """
    content = regular_file(path).read_bytes()
    if max(map(len, content.split(b"\n"))) > LONGEST_LINE:
        raise InputError(f"{path} has a line of more than {LONGEST_LINE:,} bytes, expected lines of text; make the file again")
    return content.decode("utf-8-sig")


@contextlib.contextmanager
def opened_npz(path):
    """Context of the arrays of an npz that np.savez wrote, which compresses nothing; ValueError if it would inflate."""
    import numpy as np

    with open(regular_file(path), "rb") as file, np.load(file, allow_pickle=False) as content:
        if sum(member.file_size for member in content.zip.infolist()) > os.fstat(file.fileno()).st_size:
            raise ValueError("it holds more than its size")
        yield content


def write_bytes(path, content):
    """Write bytes to `path`, whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_csv(table, path):
    """Write a DataFrame without its index, whole or not at all."""
    with replaced(path) as temporary:
        table.to_csv(temporary, index=False)


def read_csv(path, columns, gaps=False, ended=False):
    """DataFrame of a CSV with exactly `columns`, and with `gaps` maybe empty cells; InputError for any other file, named.

    A first column without a name, the index of a DataFrame, is passed over. ended: the last line must be, as we write it: a
    number that is cut short is a number still.
    """
    import pandas as pd

    try:
        text = read_text(path)
        if ended and not text.endswith("\n"):
            raise ValueError("its last line is cut short")
        # pandas takes a minute over thousands of columns, and takes those of the first row that have no name for an index
        if max(line.count(",") for line in text.split("\n", 2)[:2]) > len(columns):
            raise ValueError("it has more columns than expected")
        table = pd.read_csv(io.StringIO(text))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and make it again") from None
    if len(table.columns) and table.columns[0] == "Unnamed: 0":
        table = table.iloc[:, 1:]
    surplus = not isinstance(table.index, pd.RangeIndex)  # rows longer than the header: pandas takes names for them
    if surplus or list(table.columns) != list(columns) or table.empty or (table.isna().to_numpy().any() and not gaps):
        rows = "rows" if gaps else "rows without gaps"
        raise InputError(f"{path} is damaged: expected {rows} and the columns {', '.join(columns)}; remove it and make it again")
    return table


def write_json(path, content):
    """Write a dict as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path):
    """Dict of a JSON file; InputError that names the file if it is missing or damaged."""
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected a model directory that a training script wrote") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: expected a JSON object")
    return content

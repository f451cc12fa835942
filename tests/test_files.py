"""What files may hold: whatever it is, a reader takes it or refuses it by name, and soon."""

import io
import os
import time
import zipfile

import pytest
import torch

from running import files
from running.command_line import InputError
from running.directory import load_torch
from running.files import read_csv, read_json

READERS = {"args.json": read_json, "results.csv": lambda path: read_csv(path, ["a", "b"], ended=True), "f_x.pt": load_torch}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises((InputError, IsADirectoryError), match=name):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("content", [
    ",".join(f"c{i}" for i in range(10**6)) + "\n" + "1," * 10**6 + "\n",
    "a,b\n" + "1," * 10**6 + "\n",
    "a,b\n" + "1," * 30_000 + "\n",
    "a,b\n1," + "9" * 10**7 + "\n",
    ",".join(f"c{i}" for i in range(10_000)) + "\n",
])  # fmt: skip
def test_a_table_of_a_million_columns_or_a_line_without_end_is_refused_soon(tmp_path, content):
    name = "results.csv"
    (tmp_path / name).write_text(content)
    started = time.process_time()
    with pytest.raises(InputError, match=name) as caught:
        READERS[name](tmp_path / name)
    assert time.process_time() - started < 5 and len(str(caught.value)) < 300  # a minute, where nothing stops it


@pytest.mark.parametrize("text", ["a,b\n1,0.9", "a,b\n1,0.9871"])
def test_a_table_whose_last_line_is_not_ended_is_damaged(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(InputError, match="cut short"):
        READERS["results.csv"](tmp_path / "results.csv")
    (tmp_path / "results.csv").write_text(text + "\n")
    assert len(READERS["results.csv"](tmp_path / "results.csv")) == 1


def test_json_without_bottom_is_damaged(tmp_path):
    for text in ("[" * 10**5, '{"a":' * 10**5, '{"seed": ' + "9" * 10**4 + "}"):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(InputError, match=r"args\.json is damaged"):
            read_json(tmp_path / "args.json")


def test_weights_that_inflate_are_refused_before_they_do(tmp_path):
    """The members of a sound file, and one of 2 GiB of zeros, as small as a deflated archive makes it."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as sound, zipfile.ZipFile(tmp_path / "f_x.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in sound.namelist():
            bomb.writestr(name, sound.read(name))
        bomb.writestr(f"{sound.namelist()[0].split('/')[0]}/data/9", bytes(2**26))
    started = time.process_time()
    with pytest.raises(InputError, match=r"f_x\.pt is damaged \(it holds more than its size"):
        load_torch(tmp_path / "f_x.pt")
    assert time.process_time() - started < 5


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    for mask in (0o022, 0o002, 0o077):
        before = os.umask(mask)
        try:
            files.write_bytes(tmp_path / "a", b"content")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_of_two_that_write_one_file_neither_removes_the_other_s_half(tmp_path):
    with files.replaced(tmp_path / "a.pt") as first, files.replaced(tmp_path / "a.pt") as second:
        assert first.exists() and second.exists()
        first.touch(), second.touch()

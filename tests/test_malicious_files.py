"""Files that were made to run code, or to write elsewhere: no reader of the project does as they wish."""

import contextlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import MPI3D_FILE, load_causal3dident, load_mpi3d
from grids.models import Model
from grids.numeric import numeric_setting
from reading.captions import read_lines
from reading.images import decode_image, open_npz_images
from running.command_line import InputError
from running.directory import checkpoint_step, load_torch, read_weights, stored_args
from running.files import read_csv
from tests.scripts import replace

TRACE = "somebody ran what was in the file"


class Payload:
    """Whoever unpickles it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (TRACE,)


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
    """The test runs in its folder, where the payload would leave its trace."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(TRACE).exists()


def pickled_array():
    """The bytes of a .npy file of one object."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def pickled_npz(**members):
    """The bytes of a .npz file whose members all are such, or hold the bytes that are given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content or pickled_array())
    return buffer.getvalue()


def torch_file(**options):
    """The bytes of a .pt file, of which the payload is a part."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "progress": {"step": Payload()}}, buffer, **options)
    return buffer.getvalue()


KINDS = {
    "pickle": lambda: pickle.dumps(Payload()),
    "npy": pickled_array,
    "npz": lambda: pickled_npz(images=None, grid=None, digest=None, vocabulary=None),
    "pt": torch_file,
    "older pt": lambda: torch_file(_use_new_zipfile_serialization=False),
}
READERS = {
    "a .pt file": load_torch,
    "a checkpoint": checkpoint_step,
    "weights": read_weights,
    "images": open_npz_images,
    "a picture": decode_image,
    "captions": read_lines,
    "a table": lambda path: read_csv(path, ["step"]),
}


@pytest.mark.parametrize("careless", [
    lambda: pickle.loads(KINDS["pickle"]()),
    lambda: np.load(io.BytesIO(KINDS["npy"]()), allow_pickle=True),
    lambda: np.load(io.BytesIO(KINDS["npz"]()), allow_pickle=True)["images"],
    lambda: torch.load(io.BytesIO(KINDS["pt"]()), weights_only=False),
    lambda: torch.load(io.BytesIO(KINDS["older pt"]()), weights_only=False),
])  # fmt: skip
def test_the_payload_runs_where_a_reader_is_careless(careless):
    careless()
    Path(TRACE).rmdir()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_a_file_runs_it(tmp_path, reader, kind):
    path = tmp_path / "file.pt"
    path.write_bytes(KINDS[kind]())
    with pytest.raises(InputError, match=r"file.pt"):
        READERS[reader](path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_s_own_files_run(tmp_path, kind):
    model = Model(numeric_setting("tiny", "independent", 3, 1), 1, tmp_path)
    model.directory.mkdir(parents=True)
    (model.directory / "args.json").write_bytes(KINDS[kind]())
    for read in (lambda: stored_args(model.directory), model.stored):
        with pytest.raises(InputError, match=r"args.json"):
            read()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_mpi3d_runs(mpi3d, kind):
    names = ("vocab_selection_1.json", "tokens_selection_1.npz", "train/image_semantics.csv", f".{MPI3D_FILE}.checked")
    for name in (*names, "test/text_selection_1.txt", MPI3D_FILE):
        before = (mpi3d / name).read_bytes() if (mpi3d / name).exists() else None
        replace(mpi3d / name, KINDS[kind]())
        with (
            contextlib.nullcontext() if name[0] in ".t" and "/" not in name else pytest.raises(InputError, match=Path(name).name)
        ):
            load_mpi3d(mpi3d, "selection", 1)
        if before is not None:
            replace(mpi3d / name, before)


def test_no_unpacked_file_of_mpi3d_runs(mpi3d):
    with np.load(mpi3d / MPI3D_FILE) as content:
        arrays = dict(content)
    (mpi3d / MPI3D_FILE).unlink()
    np.savez_compressed(mpi3d / MPI3D_FILE, **arrays)
    _, grid = open_npz_images(mpi3d / MPI3D_FILE)
    (unpacked,) = mpi3d.glob("*.npy")
    replace(unpacked, pickled_array())
    with pytest.raises(InputError, match=unpacked.name):
        open_npz_images(mpi3d / MPI3D_FILE)
    buffer = io.BytesIO()
    np.save(buffer, arrays["images"])
    replace(mpi3d / MPI3D_FILE, pickled_npz(images=buffer.getvalue(), grid=None))
    with pytest.raises(InputError, match="npz"):
        open_npz_images(mpi3d / MPI3D_FILE)
    assert grid == tuple(arrays["grid"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_causal3dident_runs(causal3dident, kind):
    load_causal3dident(causal3dident, "selections", 1)
    (decoded,) = (path.name for path in causal3dident.glob("*.npy"))
    texts = "text/selections_1"
    made_again = (decoded, f"{texts}/tokens.npz")
    names = ("latents_image.csv", "latents_text_selections_1.csv", "images.json", f"{texts}/vocab.json", f"{texts}/text_raw.txt")
    for name in (*made_again, *names, "images/003.png"):
        before = (causal3dident / name).read_bytes() if (causal3dident / name).exists() else None
        replace(causal3dident / name, KINDS[kind]())
        with contextlib.nullcontext() if name in made_again else pytest.raises(InputError, match=Path(name).name):
            load_causal3dident(causal3dident, "selections", 1)
        replace(causal3dident / name, before or json.dumps({}))
        if before is None:
            (causal3dident / name).unlink()

"""Readers and parsers take whatever comes or refuse it in one line, and touch nothing: thousands of inputs, always the same."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from grids import numeric
from grids.cells import Setting
from grids.models import Model, flags_of
from main_causal3dident import Causal3dIdentExperiment
from main_mpi3dreal import Mpi3dExperiment
from main_numeric import NumericExperiment
from reading.captions import load_captions
from reading.causal3dident import read_latents
from reading.images import decode_image, open_npz_images
from running import directory as store
from running.command_line import InputError
from running.files import read_csv, read_json
from tests.scripts import contents

EXPERIMENTS = (NumericExperiment, Mpi3dExperiment, Causal3dIdentExperiment)
PARSERS = {experiment: experiment.parser() for experiment in EXPERIMENTS}
FEW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def examples(count):
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=FEW)


def taken_or_refused(function, *arguments):
    """What the function returns, None if it refuses in one line of text that is not too long."""
    try:
        return function(*arguments)
    except InputError as error:
        assert str(error).strip()
    except OSError as error:
        assert error.filename is not None, error


ODD_NUMBERS = [2**31, 2**63, 2**64, 10**30, -1, 0, 1e308, "1_0", "٣", "1e5", "nan"]
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from(ODD_NUMBERS))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
                      lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                      max_leaves=4)  # fmt: skip


def changed(sound):
    """Strategy of bytes: those of a sound file with some bytes replaced, cut out or put in, or others."""
    place = st.integers(0, len(sound))
    some = st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b",", b"\0", b'"', b"-1", b"nan", b"1e999", "θ".encode()]))
    edits = st.lists(st.tuples(place, st.integers(0, 3), some), min_size=1, max_size=3)

    def edited(edits):
        content = sound
        for start, removed, added in edits:
            content = content[:start] + added + content[start + removed :]
        return content

    return st.one_of(edits.map(edited), edits.map(edited), place.map(lambda end: sound[:end]), st.binary(max_size=50))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@given(data=st.data())
@examples(250)
def test_flags(experiment, data):
    parser = PARSERS[experiment]
    flags = st.sampled_from([f"--{name.replace('_', '-')}" for name in parser.destinations])
    choices = st.sampled_from(["selection", "perturbations", "fast", "paper", "muon", "0", "1", "3", "auto", "", "--", "-"])
    words = st.lists(st.one_of(flags, NUMBERS.map(str), st.text(max_size=4), choices), max_size=6)
    outcome = taken_or_refused(parser.parse, data.draw(words))
    if outcome:
        taken_or_refused(experiment.settle, outcome[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@given(data=st.data())
@examples(100)
def test_args_json(tmp_path_factory, experiment, data):
    folder = tmp_path_factory.getbasetemp() / f"args_{experiment.name}"
    folder.mkdir(exist_ok=True)
    parser = PARSERS[experiment]
    args, _ = parser.parse([])
    experiment.settle(args)
    sound = {**vars(args), "seed": 1, "precision": "fp32", "finished": True}
    names = st.sampled_from([*sound, "eval_seed", "downstream", "machines", "files", "versions"])
    change = data.draw(st.dictionaries(names, VALUES, max_size=3))
    lost = data.draw(st.lists(names, max_size=1))
    stored = {name: value for name, value in (sound | change).items() if name not in lost}
    (folder / "args.json").write_text(json.dumps(stored))
    before = contents(folder)
    taken_or_refused(store.trained_args, folder, experiment)
    taken_or_refused(store.known_args, folder, parser)
    given_args, given = parser.parse(["--resume", "--model-dir", str(folder.parent), "--model-id", folder.name])
    taken_or_refused(store.adopt_stored_flags, given_args, given, parser, folder)
    assert contents(folder) == before


@given(content=changed(b'{"seed": 1, "finished": true, "a": [1, {"b": null}], "c": "\\u03b8"}'))
@examples(200)
def test_json(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.json"
    path.write_bytes(content)
    assert isinstance(taken_or_refused(read_json, path), (dict, type(None)))


SETTING = Setting(NumericExperiment, "tiny", "m", "main_numeric.py", "--semantics-n 2 --modality-n 0 --theta-value 2")
ROWS = NumericExperiment.result_rows(flags_of(SETTING))
RESULTS = "encoding,predicted_factors,r2_linear,r2_nonlinear\n" + "".join(",".join(row.values()) + ",0.25,-0.5\n" for row in ROWS)


@given(content=changed(RESULTS.encode()))
@examples(200)
def test_results(tmp_path_factory, content):
    model = Model(SETTING, 1, tmp_path_factory.getbasetemp())
    model.directory.mkdir(parents=True, exist_ok=True)
    (model.directory / "results.csv").write_bytes(content)
    rows = taken_or_refused(model.read, numeric.RESULTS)
    assert rows is None or all(np.isfinite(row["r2_linear"]) for row in rows if row["predicted_factors"] == "s_inv")
    table = taken_or_refused(read_csv, model.directory / "results.csv", ["encoding", "r2_linear"])
    assert table is None or len(table)


@given(content=changed(b"object_shape,spotlight_pos,spotlight_color_name\n0,0.5,red\n1,0.25,blue\n"))
@examples(200)
def test_latents(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "latents.csv"
    path.write_bytes(content)
    table = taken_or_refused(read_latents, path, {"object_shape": 7, "spotlight_pos": None}, ["spotlight_color_name"])
    assert table is None or ((table["object_shape"] >= 0) & (table["object_shape"] < 7)).all()


@given(captions=changed("A red cube.\nA blue “θ”.\nA red cube.\n".encode()),
       words=st.one_of(st.none(), changed(b'{"{pad}": 0, "{eos}": 1, "{unk}": 2, "red": 3}'),
                       VALUES.map(lambda value: json.dumps({"w2i": value}).encode())))  # fmt: skip
@examples(150)
def test_captions_and_vocabularies(tmp_path_factory, captions, words):
    folder = tmp_path_factory.mktemp("captions")
    (folder / "train.txt").write_bytes(captions)
    if words is not None:
        (folder / "vocab.json").write_bytes(words)
    before = contents(folder)
    parts = {"train": (folder / "train.txt", slice(None))}
    for _ in range(2):  # the second time from the cache
        loaded = taken_or_refused(load_captions, parts, folder / "vocab.json", folder / "cache.npz")
        if loaded:
            tokens = loaded[0]["train"].tokens
            assert 0 <= tokens.min() <= tokens.max() < len(loaded[1])
    (folder / "cache.npz").unlink(missing_ok=True)
    assert contents(folder) == before


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@given(content=changed(saved(nn.Linear(2, 3).state_dict())))
@examples(200)
def test_weights(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "f_x.pt"
    path.write_bytes(content)
    taken_or_refused(store.load_torch, path)
    taken_or_refused(store.load_weights, nn.Linear(2, 3), path)


@given(content=st.recursive(st.one_of(VALUES, st.integers(0, 3).map(torch.zeros)),
                            lambda inner: st.dictionaries(st.sampled_from(["weight", "bias", "progress", "step"]), inner),
                            max_leaves=4))  # fmt: skip
@examples(150)
def test_weights_of_anything(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "f_t.pt"
    path.write_bytes(saved(content))
    taken_or_refused(store.load_weights, nn.Linear(2, 3), path)


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((3, 2, 2, 3), np.uint8), grid=np.array([3, 1]))
    return buffer.getvalue()


@given(content=changed(archive()))
@examples(200)
def test_archives(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("archive")
    (folder / "images.npz").write_bytes(content)
    loaded = taken_or_refused(open_npz_images, folder / "images.npz")
    assert loaded is None or (loaded[0].ndim, loaded[0].dtype) == (4, np.uint8)
    assert (folder / "images.npz").read_bytes() == content


@given(dtype=st.sampled_from(["|u1", "<i8", "|O", "|b1", "<f4", "nonsense"]), order=st.booleans(), version=st.integers(0, 4),
       shape=st.one_of(st.tuples(NUMBERS, st.integers(0, 3), st.integers(0, 3), st.just(3)), VALUES))  # fmt: skip
@examples(150)
def test_headers_of_arrays(tmp_path_factory, dtype, order, version, shape):
    header = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode() + b"\n"
    path = tmp_path_factory.getbasetemp() / "header.npz"
    with zipfile.ZipFile(path, "w") as file:
        size = len(header).to_bytes(2 if version < 2 else 4, "little")
        file.writestr("images.npy", b"\x93NUMPY" + bytes([version, 0]) + size + header + bytes(27))
    taken_or_refused(open_npz_images, path)


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "png")
    return buffer.getvalue()


@given(content=changed(png()))
@examples(150)
def test_images(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "0.png"
    path.write_bytes(content)
    image = taken_or_refused(decode_image, path)
    assert image is None or (image.dtype, image.ndim) == (np.uint8, 3)

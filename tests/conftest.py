import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import latent_spaces
import main_numeric
import mlp_probes
from datasets import MPI3D_GRID, mpi3d_images
from rendering_data.Causal3DIdent import generate_latents, generate_text
from rendering_data.MPI3D.render_multimodal_mpi3d import render
from rendering_data.MPI3D.render_standin_images import MPI3D_FILE, write_images
from running.command_line import run_script

# a shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = (
    "--no-cuda --semantics-n 3 --modality-n 1 --theta-value 3 --batch-size 16 --train-steps 40 --log-steps 10 "
    "--num-eval-batches 1 --mlp-eval"
)


@pytest.fixture(autouse=True)
def threads():
    """One thread, unless OMP_NUM_THREADS says more: tiny matrices gain nothing from them, and the suite may share its machine."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(flags) → (exit code, stdout, stderr) of main_numeric.py in a models folder of the test.

    Fewer draws for the mixing, fewer samples and shorter fits for the probes, and no drawing: what is tested is the rest.
    """
    monkeypatch.setattr(main_numeric, "EVAL_BATCH", 300)
    monkeypatch.setattr(latent_spaces, "CONDITION_DRAWS", 1000)
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 20)
    monkeypatch.setattr(main_numeric, "plot_factor_scores", lambda tables, path, *_: path.write_bytes(b"drawn"))

    def call(flags="", model="m", base=TINY, model_dir=tmp_path / "models"):
        named = [] if model is None else ["--model-id", model]
        argv = [*base.split(), "--model-dir", str(model_dir), *named, *flags.split()]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: main_numeric.main(argv))
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def rendered_mpi3d(tmp_path_factory):
    """Folder of a small MPI3D-Complex: stand-in images and all captions; nobody changes it."""
    folder = tmp_path_factory.mktemp("mpi3d")
    sizes = dict(zip(MPI3D_GRID, (4, 4, 2, 2, 3, 2, 1), strict=True))
    write_images(folder / MPI3D_FILE, sizes)
    render(folder, sizes, train_ratio=0.75, seed=0)
    mpi3d_images(folder)  # which checks them, once for all tests
    return folder


@pytest.fixture
def mpi3d(rendered_mpi3d, tmp_path):
    """The same in a folder of the test, linked file by file: a test replaces files, it does not write into them."""
    return shutil.copytree(rendered_mpi3d, tmp_path / "mpi3d", copy_function=os.link)


@pytest.fixture(scope="session")
def drawn_causal3dident(tmp_path_factory):
    """Folder of a small Causal3DIdent, its images drawn without Blender; nobody changes it.

    A noisy square stands for the object: its place tells the position, its colour the shape.
    """
    folder = tmp_path_factory.mktemp("causal3dident")
    flags = ["--output-folder", str(folder)]
    generate_latents.main([*flags, "--n-points", "200", "--seed", "0"])
    generate_text.main(flags)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number, row in enumerate(pd.read_csv(folder / "latents_image.csv").itertuples()):
        pixels = rng.integers(0, 40, (24, 24, 3), np.uint8)
        top, left = 8 * row.object_ypos, 8 * row.object_xpos
        pixels[top : top + 8, left : left + 8] += np.uint8([30 * row.object_shape, 200 - 30 * row.object_shape, 100])
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
    return folder


@pytest.fixture
def causal3dident(drawn_causal3dident, tmp_path):
    """The same in a folder of the test, linked file by file: a test replaces files, it does not write into them."""
    return shutil.copytree(drawn_causal3dident, tmp_path / "causal3dident", copy_function=os.link)

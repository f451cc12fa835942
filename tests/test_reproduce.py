"""reproduce.py: its grids against the paper's numbers, its jobs with a training that takes seconds, its report."""

import argparse
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import eval_numeric_predict
import main_numeric
import reproduce
from grids import causal3dident, figures, jobs, models, mpi3d, numeric, report
from grids.cells import Cell, Figure
from grids.figures import FIGURES, chosen_figures, needed_models
from grids.geometry import GEOMETRY
from grids.models import COMPARED, SCALES, DataSet, Model, ResultFile, Setting, expected_args, flags_of
from grids.numeric import CLASSIFY, PREDICT, RESULTS, SEMANTICS, TASKS, numeric_setting
from latent_spaces import biased_blocks
from running import staging
from running.command_line import InputError, run_script
from running.staging import digest

REPOSITORY = Path(__file__).parent.parent
NUMERIC = ["fig3", "fig4", "fig7", "fig8", "fig9", "fig10", "table4", "table5"]

# Stands for a training script: counts to --steps, keeps its count when it is told to end, and can be made to fail.
FAKE_TRAINING = """
import argparse, json, pathlib, signal, sys, time

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--model-dir", "--model-id"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    for name in ("--seed", "--steps", "--bad-seed"):
        parser.add_argument(name, type=int, default=0)
    args = parser.parse_args()
    directory = pathlib.Path(args.model_dir, args.model_id)
    directory.mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    with open(directory / "starts", "a") as file:
        file.write("x")
    checkpoint = directory / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"from step {step}", flush=True)
    if args.seed == args.bad_seed:
        sys.exit("error: this seed is bad")
    while step < args.steps and not stopped:
        time.sleep(0.05)
        step += 1
        (directory / "begun").touch()
    print(f"until step {step}", flush=True)
    if stopped:
        checkpoint.write_text(str(step))
        sys.exit(143)
    (directory / "weights.pt").touch()
    (directory / "results.csv").write_text("factor,score\\n" + f"s,{args.seed}\\n")
    kept = {"seed": args.seed, "steps": args.steps, "bad_seed": args.bad_seed, "finished": True}
    (directory / "args.json").write_text(json.dumps(kept))
"""


class FakeExperiment:
    """What the fake training's args.json, weights and results must be."""

    name, weight_files = "fake", ("weights.pt",)

    @classmethod
    def parser(cls):
        return argparse.Namespace(freely={"model_dir", "model_id", "resume"})

    @classmethod
    def parse_flags(cls, argv):
        parser = argparse.ArgumentParser()
        for name in ("--steps", "--bad-seed"):
            parser.add_argument(name, type=int, default=0)
        return parser.parse_args(argv), set()

    @classmethod
    def settle(cls, args):
        pass

    @classmethod
    def result_rows(cls, args):
        return [{"factor": "s"}]


def fake_figure(name, flags):
    """A figure of one setting of the fake training."""
    file = ResultFile("results.csv", ("factor",), ("score",))

    def cells(figure, scale):
        setting = Setting(FakeExperiment, scale, name, "fake_training.py", flags)
        yield Cell({"factor": "s"}, ("R²", "fake"), "s", "{1}", setting, file, {"factor": "s"}, "score")

    return Figure(name, "a fake", "fake", cells)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name=flags, …) makes these the only figures."""
    (tmp_path / "fake_training.py").write_text(FAKE_TRAINING)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(**settings):
        fakes = {name: fake_figure(name, flags) for name, flags in settings.items()}
        monkeypatch.setattr(figures, "FIGURES", fakes)
        monkeypatch.setattr(figures, "GROUPS", {"all": list(fakes)})

    return make


@pytest.fixture
def call(capsys):
    """call(words) → (exit code, stdout, stderr) of reproduce.py."""

    def call(words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: reproduce.main(words.split()))
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def is_one_line_error(answer, *words):
    code, _, err = answer
    return code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words)


# --------------------------------------------------------------------------------------------------------------
# the grids


@pytest.mark.parametrize("scale", COMPARED)
def test_every_cell_of_the_paper_has_a_setting_that_produces_it_and_the_other_way_round(scale):
    for file in {figure.paper for figure in FIGURES.values() if figure.paper}:
        paper = pd.read_csv(REPOSITORY / "paper" / file, keep_default_na=False)
        keys = [name for name in paper.columns if name != "value"]
        ours = [
            tuple(cell.keys[key] for key in keys)
            for figure in FIGURES.values()
            if figure.paper == file
            for cell in figure.cells(scale)
        ]
        assert len(ours) == len(set(ours))
        assert set(ours) == set(paper[keys].itertuples(index=False, name=None))


def test_a_figure_has_the_paper_s_cells_of_its_own_number():
    for name in NUMERIC:
        figure = FIGURES[name]
        assert {f"{k}{cell.keys[k]}" for cell in figure.cells("paper") for k in ("figure", "table") if k in cell.keys} == {
            name.replace("fig", "figure")
        }


@pytest.mark.parametrize("scale", SCALES)
def test_the_grid_has_114_models_and_12_of_the_tables_and_shares_the_one_without_bias(scale):
    chosen = chosen_figures([name for name in NUMERIC if "fig" in name])
    all_models = needed_models(chosen_figures(["numeric"]), scale, 3, "models")
    bias_models = needed_models(chosen, scale, 3, "models")
    n = SEMANTICS[scale]
    assert len(bias_models) == 2 * (2 * n - 1) * 3  # 114 of ten semantics
    assert len(all_models) == len(bias_models) + 12
    by_name, by_flags = ({getattr(model.setting, key) for model in all_models} for key in ("name", "flags"))
    assert len(by_name) == len(by_flags) == len({model.setting for model in all_models}) == len(all_models) / 3
    assert len({model.directory for model in all_models}) == len(all_models)


def test_settings_are_named_and_flagged_as_they_are_trained():
    directory = Model(numeric_setting("paper", "independent", 3), 1, Path("models")).directory
    assert str(directory) == "models/numeric/ind_select_3_seed1"
    shared = numeric_setting("fast", "dependent", 10)
    assert shared == numeric_setting("fast", "dependent", 10, 0)
    assert str(Model(shared, 2, Path("m")).directory) == "m/numeric-fast/dep_select_10_seed2"
    assert numeric_setting("paper", "independent", 8, 2).name == "ind_select_8_perturb_2"
    for scale, n in SEMANTICS.items():
        for selected in range(1, n + 1):
            args = expected_args(numeric_setting(scale, "independent", selected, selected - 1))
            blocks = biased_blocks(args["theta_value"], args["beta_value"], n)
            assert blocks == (tuple(range(selected)), tuple(range(selected - 1)), (selected - 1,))
        for cell in itertools.chain.from_iterable(FIGURES[name].cells(scale) for name in NUMERIC):
            args = expected_args(cell.setting)
            assert args["causal_dependence"] == ("dep" in cell.setting.name) and args["protocol"] == "code"
            assert args["recipe"] == ("paper" if scale == "paper" else "fast") and args["semantics_n"] == n
    args = expected_args(numeric_setting("paper", "independent", 3, 0, 5))
    assert (args["theta_value"], args["beta_value"], args["encoding_size"], args["mlp_eval"]) == (55, -1, 5, True)
    assert {k: v for k, v in args.items() if k in main_numeric.RECIPES["paper"]} == main_numeric.RECIPES["paper"]


def test_the_theory_s_pattern_is_that_of_the_unbiased_block():
    learned = {cell.setting.name: set() for cell in FIGURES["table5"].cells("paper")}
    for cell in FIGURES["table5"].cells("paper"):
        if cell.learned:
            learned[cell.setting.name].add(cell.keys["factor"])
    assert learned == {"ind_select_8_perturb_2": {"s_3", "s_4", "s_5", "s_6", "s_7", "s_8"}, "dep_select_8_perturb_2": set()}


def test_settings_of_mpi3d_are_named_and_flagged_as_they_are_trained():
    cells = list(FIGURES["fig5"].cells("fast"))
    assert len(cells) == 2 * 7 * 10 and len({cell.setting for cell in cells}) == 10
    for cell in cells:
        args = expected_args(cell.setting)
        assert cell.setting.name == f"{args['bias_type']}_{args['bias_id']}" and args["recipe"] == "fast"
        told = ["OBJ_COLOR", "OBJ_SHAPE", "OBJ_SIZE", "CAMERA", "BACKGROUND"]
        k = args["bias_id"]
        unbiased = told[: k + 1] if args["bias_type"] == "selection" else told[: 5 - k]
        assert cell.learned == (cell.keys["factor"] in unbiased)
        assert cell.panel == (f"{cell.keys['modality']} encoding", f"{args['bias_type']} bias")
    columns = list(dict.fromkeys((cell.panel[1], cell.column) for cell in cells))
    assert columns[0] == ("selection bias", "0: OBJ_COLOR") and columns[1] == ("selection bias", "1: + OBJ_SHAPE")
    assert columns[5:7] == [("perturbation bias", "0: ∅"), ("perturbation bias", "1: + BACKGROUND")]
    sizes = {cell.column: expected_args(cell.setting) for cell in FIGURES["fig13"].cells("paper")}
    assert {column: args["encoding_size"] for column, args in sizes.items()} == {
        "size 1": 1, "size 2": 2, "size 3": 0, "size 4": 4,
    }  # fmt: skip
    assert {(args["bias_type"], args["bias_id"], args["recipe"]) for args in sizes.values()} == {("selection", 0, "paper")}


def test_settings_of_causal3dident_are_named_and_flagged_as_they_are_trained():
    told = ["object_shape", "object_xpos", "object_ypos", "spotlight_pos", "object_color", "spotlight_color",
            "background_color"]  # fmt: skip
    expected = {}
    for k in range(7):
        # of the discrete factors and the spotlight's position, the unbiased are a prefix in either case
        expected["selections", k], expected["perturbations", k] = told[: min(k + 1, 4)], told[: min(7 - k, 4)]
    for name in ("fig6", "fig16", "fig17", "fig18"):
        cells = list(FIGURES[name].cells("fast"))
        assert len({cell.setting for cell in cells}) == 14
        for cell in cells:
            args, factor = expected_args(cell.setting), cell.where["factor_name"]
            assert cell.setting.name == f"{args['bias_type']}_{args['bias_id']}" and args["recipe"] == "fast"
            assert (cell.keys["bias_type"], cell.keys["bias_id"]) == (args["bias_type"], args["bias_id"])
            kind = {"r2": ("r2_linreg", "r2_krreg"), "mcc": ("mcc_logreg", "mcc_mlp")}[cell.keys["metric"]]
            assert cell.score == kind[cell.keys["probe"] == "nonlinear"]
            assert cell.keys["factor"].replace("splotlight", "spotlight") == factor == cell.row
            unbiased = expected[args["bias_type"], args["bias_id"]]
            if name in ("fig17", "fig18") or "color" in factor or (factor == "spotlight_pos" and factor in unbiased):
                assert cell.learned is None
            else:
                assert cell.learned is (factor in unbiased), (cell.setting.name, factor)
    columns = list(dict.fromkeys((cell.panel[1], cell.column) for cell in FIGURES["fig16"].cells("paper")))
    assert columns[:2] == [("selection bias", "0: object_shape"), ("selection bias", "1: + object_xpos")]
    # the paper's setting k is id 7 − k
    assert columns[7] == ("perturbation bias", "1 (id 6): + object_xpos")
    assert columns[12:] == [("perturbation bias", "6 (id 1): background_color"), ("perturbation bias", "7 (id 0): ∅")]
    assert {cell.setting.data for cell in FIGURES["fig6"].cells("tiny")} == {causal3dident.STANDIN_DATA}


def test_what_renders_is_run_by_blender_s_python_and_missed_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blender/bin").mkdir(parents=True)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    answer = call("run fig6 --scale tiny --seeds 1 --dry-run")
    assert is_one_line_error(answer, "contact_sheet.png is missing", ".venv-blender/bin/python", "`make blender`")
    assert "left out" not in answer[1] and answer[1].count("python main_causal3dident.py --recipe fast") == 14
    (tmp_path / ".venv-blender/bin").mkdir(parents=True)
    (tmp_path / ".venv-blender/bin/python").touch()
    code, out, _ = call("run fig6 --scale tiny --seeds 1 --dry-run")
    commands = [line.split()[:2] for line in out.splitlines()[1:5]]
    tools = "rendering_data/Causal3DIdent"
    assert code == 0 and commands == [
        ["python", f"{tools}/generate_latents.py"],
        ["python", f"{tools}/generate_text.py"],
        [".venv-blender/bin/python", f"{tools}/generate_images.py"],
        ["python", f"{tools}/contact_sheet.py"],
    ]
    Path(causal3dident.STANDIN).mkdir(parents=True)
    Path(causal3dident.STANDIN_DATA.file).touch()
    assert "generate" not in call("run fig6 --scale tiny --seeds 1 --dry-run")[1]


def test_a_data_set_is_made_once_before_its_models_or_named_if_it_cannot_be(fake, call, tmp_path, monkeypatch):
    (tmp_path / "make_data.py").write_text("import sys; open(sys.argv[1], 'x').close()")
    made = DataSet("data.csv", ("make_data.py data.csv",))
    for data, code in ((made, 0), (DataSet("other.csv", (), "get it from its authors"), 2)):
        figure = fake_figure("slow", "--steps 1")
        cell = figure.cells("tiny")[0]
        setting = dataclasses.replace(cell.setting, name=Path(data.file).stem, data=data)
        figure = dataclasses.replace(figure, make_cells=lambda *_, c=cell, s=setting: [dataclasses.replace(c, setting=s)])
        monkeypatch.setattr(figures, "FIGURES", {"slow": figure})
        monkeypatch.setattr(figures, "GROUPS", {"all": ["slow"]})
        answer = call("run slow --scale tiny --seeds 1")
        assert answer[0] == code and Path(data.file).exists() == (code == 0)
        if code:
            assert is_one_line_error(answer, "other.csv is missing: get it from its authors")
            assert not Path("models/fake-tiny/other_seed1").exists()
        else:  # a second model of the same data does not make them again, which would fail
            assert call("run slow --scale tiny --seeds 2")[0] == 0


def test_the_published_models_are_of_the_settings_as_they_are_now():
    folder = REPOSITORY / "results/standin/models"
    needed = needed_models(chosen_figures(["causal3dident", "mpi3d"]), "tiny", 3, folder)
    published = {model: model.missing(files) for model, files in needed.items() if model.directory.exists()}
    assert len(published) == len(list(folder.glob("*/*"))) > 0
    assert not any(published.values()), published


@pytest.mark.parametrize("broken", [("other.csv", (), "get it from its authors"), ("other.csv", ("break.py",), "")])
def test_models_whose_data_set_cannot_be_had_are_left_out_and_the_others_trained(fake, call, tmp_path, monkeypatch, broken):
    (tmp_path / "break.py").write_text("raise SystemExit(3)")
    cells = []
    for data in (DataSet(*broken), None):
        cell = fake_figure("slow", "--steps 1").cells("tiny")[0]
        setting = dataclasses.replace(cell.setting, name="other" if data else "free", data=data)
        cells.append(dataclasses.replace(cell, setting=setting))
    monkeypatch.setattr(figures, "FIGURES", {"slow": dataclasses.replace(fake_figure("slow", ""), make_cells=lambda *_: cells)})
    monkeypatch.setattr(figures, "GROUPS", {"all": ["slow"]})
    reason = "break.py ended with exit code 3" if broken[1] else "other.csv is missing: get it from its authors"
    code, out, err = call("run all --scale tiny --seeds 2")
    assert code == 2 and "2 models are left out: " + reason in out and "free_seed2 done" in out
    assert err.startswith("2 models were left out, other_seed1 the first: " + reason) and err.count("\n") == 1
    code, out, err = call("run all --scale tiny --seeds 2")
    assert (code, err.count("\n")) == (2, 1) and reason in err and "2 are done" in out


def test_list_counts_models_and_tells_what_they_need(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and "60 models" in lines["fig3"] and "6 models" in lines["table4"]
    assert lines["fig4"].endswith("main_numeric.py + eval_numeric_predict.py")
    assert "30 models" in lines["fig5"] and "12 models" in lines["fig13"]
    assert all("14 settings" in lines[name] and "42 models" in lines[name] for name in ("fig6", "fig16", "fig17", "fig18"))
    # 126 numeric ones, 30 of MPI3D-Complex and 9 with other encoding sizes, of which Figure 13 shares three more, and the
    # 42 of Causal3DIdent, which its four figures share
    assert "207 models" in lines["together"] and "0 done" in lines["together"]
    assert lines["fig6"].endswith(f"main_causal3dident.py + {causal3dident.DATA.file} (missing)")
    Path(causal3dident.DATA.file).parent.mkdir(parents=True)
    Path(causal3dident.DATA.file).touch()
    assert call("list fig6")[1].splitlines()[1].endswith(f"main_causal3dident.py + {causal3dident.DATA.file}")
    for script in {model.setting.script for model in needed_models(FIGURES.values(), "paper", 1, "models")}:
        assert (REPOSITORY / script).exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("run fig33", ("'fig33' is no figure", "fig3, fig4")),
        ("report figure3", ("'figure3' is no figure",)),
        ("run fig3 --scale huge", ("--scale", "huge")),
        ("run fig3 --seeds 0", ("--seeds", "0")),
        ("run fig3 --time 4", ("--time", "4 is too small, expected an integer of at least 5")),
        ("report --models nowhere", ("no finished model", "nowhere")),
    ],
)
def test_wrong_words_are_one_line(call, words, named):
    assert is_one_line_error(call(words), *named)


def test_slurm_that_is_not_there_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert is_one_line_error(call(f"run fig3 --cluster slurm --models {tmp_path}"), "sbatch")


def test_dry_run_prints_each_model_s_commands_once_and_does_nothing(call, tmp_path):
    code, out, _ = call(f"run fig3 fig4 fig8 --dry-run --seeds 1 --models {tmp_path}/m")
    commands = out.splitlines()[1:]
    assert code == 0 and len(commands) == 20 and not (tmp_path / "m").exists()
    assert commands[2] == (
        f"python main_numeric.py --mlp-eval --theta-value 55 --model-dir {tmp_path}/m/numeric --model-id ind_select_3_seed1 "
        f"--seed 1 --resume && python eval_numeric_predict.py --model-id {tmp_path}/m/numeric/ind_select_3_seed1 --overwrite"
    )


# --------------------------------------------------------------------------------------------------------------
# jobs


def starts(name):
    return len(Path(f"models/fake-tiny/{name}/starts").read_text())


def test_models_are_trained_once_failures_listed_and_the_same_command_does_the_rest(fake, call):
    fake(good="--steps 2", bad="--steps 2 --bad-seed 2")
    code, out, err = call("run all --scale tiny --seeds 2 --jobs 2")
    assert code == 2 and "4 models, 0 are done, 4 to do" in out
    assert "1 of 4 models failed" in err and "bad_seed2: error: this seed is bad" in err
    log = re.search(r"log: (.*)", err).group(1)
    assert log == "models/logs/fake-tiny/bad_seed2.log" and "this seed is bad" in Path(log).read_text()
    code, out, _ = call("run all --scale tiny --seeds 2")
    assert code == 2 and "3 are done, 1 to do" in out
    assert [starts(f"{name}_seed{seed}") for name in ("good", "bad") for seed in (1, 2)] == [1, 1, 1, 2]
    code, out, _ = call("run good --scale tiny --seeds 2")
    assert code == 0 and "2 are done, 0 to do" in out
    listed = call("list bad --scale tiny --seeds 3")[1]
    assert "1 settings    3 models    1 done" in listed and "together 3 models, each trained once: 1 done" in listed
    assert re.findall(r"models/fake-tiny/(.*)", listed) == ["bad_seed1  done", "bad_seed2  begun", "bad_seed3  missing"]


def started(words, path):
    """reproduce.py with the fake figures in a process of its own; waits until `path` is there."""
    code = "import sys; sys.path[:0] = ['.', sys.argv[1]]\n" + (
        "from tests.test_reproduce import fake_figure\nimport pathlib, reproduce\nfrom grids import figures, models\n"
        "models.ROOT, figures.FIGURES = pathlib.Path.cwd(), {'slow': fake_figure('slow', '--steps 60')}\n"
        "reproduce.run_script(lambda: reproduce.main(sys.argv[2:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(REPOSITORY), *words.split()], stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_has_its_models_checkpointed_and_resumes(fake, call, signum):
    fake(slow="--steps 60")
    process = started("run slow --scale tiny --seeds 1", "models/fake-tiny/slow_seed1/begun")
    # Ctrl-C and a terminal that is closed reach every process of it
    (os.kill if signum == signal.SIGTERM else os.killpg)(process.pid, signum)
    assert "the same command goes on" in process.communicate(timeout=30)[1].decode() and process.returncode == 130
    checkpoint = Path("models/fake-tiny/slow_seed1/checkpoint")
    step = int(checkpoint.read_text())
    assert 0 < step < 60
    assert call("run slow --scale tiny --seeds 1")[0] == 0
    assert f"from step {step}" in Path("models/logs/fake-tiny/slow_seed1.log").read_text()
    assert starts("slow_seed1") == 2


def test_a_run_that_is_killed_leaves_a_job_that_the_same_command_waits_for(fake, call):
    fake(slow="--steps 60")
    process = started("run slow --scale tiny --seeds 1", "models/fake-tiny/slow_seed1/begun")
    process.kill()
    process.wait()  # its job goes on, and has its stderr: `communicate` would wait for that
    assert not Path("models/fake-tiny/slow_seed1/args.json").exists()
    assert call("run slow --scale tiny --seeds 1")[0] == 0
    process.stderr.close()
    log = Path("models/logs/fake-tiny/slow_seed1.log").read_text()
    # the second job waited for the first: never both at once
    assert [line for line in log.splitlines() if " step " in line] == 2 * ["from step 0", "until step 60"]
    results = pd.read_csv("models/fake-tiny/slow_seed1/results.csv")
    assert results.score.tolist() == [1]


def test_a_job_gives_what_to_requeue_and_the_next_one_goes_on(fake, tmp_path):
    """The signal of SLURM before the time limit, and a second SIGTERM while the checkpoint is written."""
    fake(slow="--steps 60")
    (tmp_path / "logs").mkdir()
    model = Model(figures.FIGURES["slow"].cells("tiny")[0].setting, 1, Path("models"))
    job = jobs.make_job(model, model.commands([]), jobs.threads(1))
    answer = []

    def preempt(*_):
        answer.append(job.checkpoint())
        raise SystemExit

    previous = signal.signal(signal.SIGALRM, preempt), signal.getsignal(signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(SystemExit):
            job()
        assert job.child.wait() == 143
        assert 0 < int((model.directory / "checkpoint").read_text()) < 60
        assert answer[0].function() == 0 and model.stored()["finished"]
    finally:
        signal.signal(signal.SIGALRM, previous[0])
        signal.signal(signal.SIGTERM, previous[1])


def test_jobs_have_their_share_of_the_cores_and_a_gpu_of_their_own(fake, monkeypatch):
    environments = []
    fake(a="--steps 1", b="--steps 2", c="--steps 3")
    make_job = jobs.make_job
    monkeypatch.setattr(jobs, "make_job", lambda *args: environments.append(args[2]) or make_job(*args))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert reproduce.main(["run", "all", "--scale", "tiny", "--seeds", "1", "--jobs", "2"]) == 0
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in environments} == {"4", "7"}
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"4"}
    fake(d="--steps 1")  # a single model is left: it has the threads that it would have had beside another
    environments.clear()
    assert reproduce.main(["run", "all", "--scale", "tiny", "--seeds", "1", "--jobs", "2"]) == 0
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["4"]
    fake(e="--steps 1")
    environments.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1,0")  # no GPU, as CUDA reads it
    assert reproduce.main(["run", "all", "--scale", "tiny", "--seeds", "1", "--gpus-per-job", "2"]) == 0
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == [""]


def test_several_gpus_for_a_job_train_one_model(fake, call):
    fake(a="--steps 1")
    _, out, _ = call("run a --scale tiny --seeds 1 --gpus-per-job 2 --dry-run")
    assert "python -m torch.distributed.run --standalone --nproc_per_node=2 fake_training.py --steps 1" in out
    assert "torch.distributed" not in call("run a --scale tiny --seeds 1 --dry-run")[1]


def test_more_gpus_for_a_job_than_there_are_is_one_line(fake, call, monkeypatch):
    fake(slow="--steps 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    answer = call("run slow --scale tiny --seeds 1 --gpus-per-job 3")
    assert is_one_line_error(answer, "--gpus-per-job 3", "2 of this machine")


def test_slurm_is_asked_for_what_the_flags_say(fake, call, monkeypatch):
    asked = []

    class Executor:
        def __init__(self, folder, max_num_timeout):
            assert max_num_timeout > 1000  # requeued at every time limit

        def update_parameters(self, **parameters):
            asked.append(parameters)

        def submit_array(self, jobs):
            asked.extend(job.environment.get("CUDA_VISIBLE_DEVICES") for job in jobs)
            raise OSError("error: invalid partition")

    fake(slow="--steps 1")
    monkeypatch.setattr(jobs.submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    words = "run slow --scale tiny --seeds 2 --cluster slurm --mem 1.5"
    answer = call(f"{words} --partition gpu --time 30 --gpus-per-job 2 --cpus-per-job 3 --jobs 5")
    assert is_one_line_error(answer, "SLURM refuses the jobs: error: invalid partition")
    expected = {"job_name": "fake-tiny", "time": 30, "cpus_per_task": 3, "mem": "1536MB", "array_parallelism": 5,
                "additional_parameters": {"requeue": True}, "wckey": None}  # fmt: skip
    assert asked == [expected | {"partition": "gpu", "gpus_per_node": 2}, None, None]
    asked.clear()
    assert call(f"{words} --gpus-per-job 0")[0] == 2
    assert asked == [expected | {"time": 720, "cpus_per_task": 4, "array_parallelism": 32}, "", ""]


STAND_IN = """#!/bin/sh
# runs the first line of its answers, and takes it away unless it is the last
echo "$@" >> "$0.calls"
line=$(head -n 1 "$0.answers")
[ "$(wc -l < "$0.answers")" -gt 1 ] && sed -i 1d "$0.answers"
eval "$line"
"""


@pytest.fixture
def slurm(fake, tmp_path, monkeypatch):
    """slurm(squeue=[…], …) puts commands in the PATH that answer by a line of shell each; returns calls(name) → their words."""
    fake(slow="--steps 1")
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    Path("models/logs/fake-tiny").mkdir(parents=True)
    Path("models/logs/submitit").mkdir()

    def make(**answers):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("sbatch", "srun", "squeue", "sacct"):
            (folder / f"{name}.answers").write_text("".join(f"{line}\n" for line in answers.get(name, ["exit 1"])))
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)

        def calls(name):
            file = folder / f"{name}.calls"
            return file.read_text().splitlines() if file.exists() else []

        return calls

    return make


def accounting(state):
    return f"echo 'JobID|State'; echo '5|{state}'; echo '5.batch|COMPLETED'"


ON_SLURM = "run slow --scale tiny --seeds 1 --cluster slurm"
JOB = Path("models/logs/fake-tiny/slow_seed1.job")
TRAINED = (
    "cd models/fake-tiny/slow_seed1; touch weights.pt; printf 'factor,score\\ns,1\\n' > results.csv; "
    """echo '{"seed": 1, "steps": 1, "bad_seed": 0, "finished": true}' > args.json; """
)


@pytest.mark.parametrize("queue", [["exit 1", "echo 5", "true"], ["true"]])
def test_jobs_that_squeue_leaves_out_while_sacct_has_them_run_are_waited_for(slurm, call, queue):
    """The controller has just started, or does not answer: no job is submitted twice, none is called failed."""
    running = 20 * [accounting("RUNNING")] + ["exit 1", accounting("PENDING")]
    calls = slurm(squeue=queue, sacct=[*running, TRAINED + accounting("COMPLETED")])
    JOB.write_text("5\n")
    Path("models/fake-tiny/slow_seed1").mkdir(parents=True)
    code, out, err = call(ON_SLURM)
    assert code == 0 and "1 jobs of an earlier call" in out and "slow_seed1 done" in out, err
    assert not calls("sbatch") and len(calls("sacct")) >= 22 and "--jobs=5" in calls("sacct")[0]


def test_a_queued_job_that_runs_less_than_is_wanted_now_is_followed_by_another(slurm, call):
    """Such as a model's training that an earlier figure asked for, where this one needs its downstream tasks too."""
    calls = slurm(squeue=["echo 5"], sbatch=["exit 1"])
    JOB.write_text("5 another.py\n")
    assert is_one_line_error(call(ON_SLURM), "SLURM refuses the jobs") and len(calls("sbatch")) == 1
    calls = slurm(squeue=["echo 5", "true"], sacct=[TRAINED + accounting("COMPLETED")])
    JOB.write_text("5 another.py fake_training.py\n")
    Path("models/fake-tiny/slow_seed1").mkdir(parents=True, exist_ok=True)
    assert call(ON_SLURM)[0] == 0 and not calls("sbatch")


def test_a_queue_that_does_not_answer_is_one_line_and_nothing_is_submitted(slurm, call):
    calls = slurm(squeue=[*jobs.LONG_ABSENCES * ["exit 1"], "true"], sbatch=["echo Submitted batch job 7"])
    JOB.write_text("5_3\n")
    assert is_one_line_error(call(ON_SLURM), "squeue does not answer", "nothing was submitted")
    assert not calls("sbatch") and len(calls("squeue")) == jobs.LONG_ABSENCES


def test_a_job_that_never_started_is_told_by_what_slurm_said_of_it(slurm, call):
    """Of job 5 nothing is known any more, and a cluster without accounting says nothing of job 7."""
    said = "echo 'slurmstepd: error: the node has no disk' > models/logs/submitit/7_0_log.err"
    calls = slurm(squeue=["true"], sbatch=[f'cp "$1" script; {said}; echo Submitted batch job 7'])
    JOB.write_text("5\n")
    code, _, err = call(ON_SLURM)
    assert code == 2 and "slow_seed1: slurmstepd: error: the node has no disk" in err
    assert JOB.read_text() == "7 fake_training.py\n" and len(calls("sbatch")) == 1
    assert len(calls("squeue")) == 2 * jobs.LONG_ABSENCES
    assert "#SBATCH --requeue" in Path("script").read_text() and "wckey" not in Path("script").read_text()
    slurm(squeue=["true"], sacct=[accounting("CANCELLED by 0")], sbatch=["echo Submitted batch job 5"])
    assert "slow_seed1: it never started" in call(ON_SLURM)[2]


def test_without_locks_nothing_is_waited_for(fake, monkeypatch):
    """Lustre that is mounted without them answers ENOSYS."""
    fake(slow="--steps 1")
    model = Model(figures.FIGURES["slow"].cells("tiny")[0].setting, 1, Path("models"))

    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(jobs.fcntl, "flock", refused)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert jobs.make_job(model, model.commands([]), {})() == 0 and model.finished()
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_real_scripts_train_and_evaluate_a_model(call, tmp_path, monkeypatch):
    shorter = "--batch-size 32 --train-steps 20 --num-eval-batches 1"
    monkeypatch.setitem(numeric.FLAGS, "tiny", f"{numeric.FLAGS['tiny']} {shorter}")
    code, out, err = call(f"run table5 --scale tiny --seeds 1 --jobs 2 --models {tmp_path}/models")
    assert code == 0, err
    model = Model(numeric_setting("tiny", "independent", 3, 1), 1, tmp_path / "models")
    assert (model.directory / "results.csv").exists()
    # the downstream tasks as `run` asks for them, in this process and with fewer steps
    monkeypatch.setattr(eval_numeric_predict, "FAST_STEPS", (20, 20))
    [(_, script, *flags)] = model.commands([PREDICT, CLASSIFY])
    assert Path(script).name == "eval_numeric_predict.py" and eval_numeric_predict.main(flags) == 0
    assert model.missing([RESULTS, PREDICT, CLASSIFY]) == []
    (model.directory / "results.csv").unlink()
    code, out, _ = call(f"run table5 --scale tiny --seeds 1 --models {tmp_path}/models --dry-run")
    assert code == 0 and "1 are done, 1 to do" in out and out.rstrip().endswith("--seed 2 --evaluate")
    [(_, script, *flags)] = model.commands([RESULTS])
    assert main_numeric.main(flags) == 0 and model.missing([RESULTS]) == []
    code, out, _ = call(f"report table5 --models {tmp_path}/models --output {tmp_path}/report")
    assert code == 0 and out.startswith("tiny scale: 48 of 48 cells computed")
    # the same models are none of the next larger problem
    shutil.move(tmp_path / "models/numeric-tiny", tmp_path / "models/numeric-fast")
    for directory in (tmp_path / "models/numeric-fast").iterdir():
        directory.rename(directory.with_name(directory.name.replace("select_3_perturb_1", "select_8_perturb_2")))
    assert is_one_line_error(call(f"report table5 --scale fast --models {tmp_path}/models"), "args.json", "fast scale")
    code, _, err = call(f"run table5 --scale fast --seeds 1 --models {tmp_path}/models")
    assert code == 2 and err.count("\n") == 2 == err.count("seed1 is damaged") == err.count("at fast scale has")
    code, out, _ = call(f"list --scale fast --models {tmp_path}/models")
    assert code == 2 and out.count("seed1  damaged: ") == 2 == out.count("at fast scale has") and "0 done" in out


NOT_ENDED = ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED", "SIGNALING", "CONFIGURING", "COMPLETING",
             "RESIZING", "STAGE_OUT")  # fmt: skip


@pytest.mark.parametrize("state", [*NOT_ENDED, "COMPLETED"])
def test_what_sacct_says_of_a_job_that_squeue_leaves_out(monkeypatch, state):
    asked = []

    def says(*command):
        asked.append(command)
        return "" if command[0] == "squeue" else f"JobID|State\n5_3|{state}\n"

    monkeypatch.setattr(jobs, "slurm_says", says)
    absences = {"5_3": 0}
    looks = [jobs.look_for_jobs(absences) for _ in range(3)]
    assert "--array" in asked[0], "an array's jobs are known by 5_3, not by 5_[0-3]"
    ended = state == "COMPLETED"
    assert looks == ([(set(), set()), (set(), {"5_3"}), (set(), {"5_3"})] if ended else 3 * [({"5_3"}, set())])


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_signals_of_a_job_s_child(monkeypatch, executor):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    code = "import signal as s; print(*(s.getsignal(n).name for n in (s.SIGTERM, s.SIGUSR2)), s.pthread_sigmask(s.SIG_BLOCK, ()))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        said = subprocess.check_output([sys.executable, "-c", code], preexec_fn=jobs.ModelJob.set_signals, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert said.split() == ["SIG_IGN" if executor == "slurm" else "SIG_DFL", "SIG_IGN", "set()"]


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_a_job_that_slurm_stops_waits_to_be_requeued(tmp_path, monkeypatch, executor):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    slept, previous = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jobs.time, "sleep", slept.append)
    job = jobs.ModelJob([[sys.executable, "-c", "raise SystemExit(1)"]], str(tmp_path / "log"), str(tmp_path / "lock"), {})
    job.stopped = True
    try:
        assert job() == 143 and slept == ([90] if executor == "slurm" else [])
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_several_gpus_of_a_job_are_its_own_and_share_its_threads(fake, monkeypatch):
    environments, make_job = [], jobs.make_job
    fake(a="--steps 1", b="--steps 1", c="--steps 1")
    monkeypatch.setattr(jobs, "make_job", lambda *args: environments.append(args[2]) or make_job(*args))
    monkeypatch.setattr(Model, "commands", lambda model, files, gpus=1, real=Model.commands: real(model, files))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert reproduce.main(["run", "all", "--scale", "tiny", "--seeds", "1", "--gpus-per-job", "2"]) == 0
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in environments} == {"0,1", "2,3"}
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"3"}, "12 cores, two jobs, two processes each"


def test_without_gpus_so_many_models_train_at_a_time_as_there_are_cores_up_to_8(fake, monkeypatch):
    environments, make_job = [], jobs.make_job
    monkeypatch.setattr(jobs, "make_job", lambda *args: environments.append(args[2]) or make_job(*args))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    fake(a="--steps 1")
    assert reproduce.main(["run", "all", "--scale", "tiny", "--seeds", "1", "--gpus-per-job", "0"]) == 0
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["4"]


def test_a_child_that_outlives_its_job_keeps_the_next_one_out(fake, tmp_path):
    fake(slow="--steps 80")
    model = Model(figures.FIGURES["slow"].cells("tiny")[0].setting, 1, Path("models"))
    job = jobs.make_job(model, model.commands([]), {})
    if not (pid := os.fork()):
        job()
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (model.directory / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(model.log(".lock"), "a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    while not (model.directory / "args.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_job_of_a_model_begins_when_the_first_has_ended(fake, monkeypatch):
    fake(slow="--steps 80")
    process = started("run slow --scale tiny --seeds 1", "models/fake-tiny/slow_seed1/begun")
    process.kill()
    process.wait()  # its job goes on, and has its stderr: `communicate` would wait for that
    model = Model(figures.FIGURES["slow"].cells("tiny")[0].setting, 1, Path("models"))
    finished, previous, seen = model.directory / "args.json", signal.getsignal(signal.SIGTERM), []
    assert not finished.exists()
    monkeypatch.setattr(jobs.ModelJob, "run", lambda *_: seen.append(finished.exists()) or 0)
    try:
        assert jobs.make_job(model, model.commands([]), {})() == 0 and seen == [True]
    finally:
        process.stderr.close()
        signal.signal(signal.SIGTERM, previous)


def test_after_a_command_that_fails_the_next_is_not_run(tmp_path):
    fail, touch = ([sys.executable, "-c", code] for code in ("raise SystemExit(3)", "open('touched', 'w')"))
    job = jobs.ModelJob([fail, touch], str(tmp_path / "log"), str(tmp_path / "lock"), {})
    previous, place = signal.getsignal(signal.SIGTERM), os.getcwd()
    os.chdir(tmp_path)
    try:
        assert job() == 3 and not Path("touched").exists()
    finally:
        os.chdir(place)
        signal.signal(signal.SIGTERM, previous)


def test_the_last_word_about_a_job_is_the_later_one(tmp_path):
    log, complaints = tmp_path / "log", tmp_path / "err"
    for later, other in ((log, complaints), (complaints, log)):
        other.write_text("earlier\n"), os.utime(other, (1, 1))
        later.write_text("later\n"), os.utime(later, (2, 2))
        assert reproduce.last_line(log, complaints) == "later"


# --------------------------------------------------------------------------------------------------------------
# the report


def write_model(models, setting, seed, results, file=RESULTS, **changed):
    """A finished model directory with the given rows in `file`."""
    model = Model(setting, seed, Path(models))
    model.directory.mkdir(parents=True, exist_ok=True)
    stored = expected_args(setting) | {"seed": seed, "finished": True, "train_seconds": 2.5}
    stored["precision"] = "fp32" if stored["precision"] == "auto" else stored["precision"]
    for weights in setting.experiment.weight_files:
        (model.directory / weights).touch()
    stored["downstream"] = PREDICT.recorded[setting.scale]
    (model.directory / "args.json").write_text(json.dumps(stored | changed))
    pd.DataFrame(results, columns=[*file.keys, *file.scores]).to_csv(model.directory / file.name, index=False)
    return model.directory


def causal_rows(setting, **own):
    """Rows of results.csv of a model of Causal3DIdent: scores 0.5, but (linear, nonlinear) of the factors named."""
    rows, types = [], causal3dident.CAUSAL_IMAGE | causal3dident.CAUSAL_TEXT
    for keys in setting.experiment.result_rows(flags_of(setting)):
        modality, factor = keys["modality"], keys["factor_name"]
        scores, kind = own.get(factor, (0.5, 0.5)), "discrete" if types[factor] else "continuous"
        rows.append((0, modality, factor, kind, *((None, None, *scores) if types[factor] else (*scores, None, None))))
    return rows


def test_a_model_counts_whatever_its_checkpoints_and_workers_but_not_with_other_steps(tmp_path):
    [cell] = itertools.islice(FIGURES["fig6"].cells("tiny"), 1)
    rows = causal_rows(cell.setting)
    for changed in ({"checkpoint_steps": 7, "workers": 3, "save_all_checkpoints": True}, {"train_steps": 7}):
        write_model(tmp_path, cell.setting, 1, rows, causal3dident.RESULTS, **changed)
        model = Model(cell.setting, 1, tmp_path)
        if "train_steps" in changed:
            with pytest.raises(InputError, match="--train-steps 7, but"):
                model.missing([causal3dident.RESULTS])
        else:
            assert model.missing([causal3dident.RESULTS]) == []


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("spelling", ["spotlight_color_index", "splotlight_color_index"])
def test_results_count_with_and_without_an_index_in_either_spelling(tmp_path, index, spelling):
    cell = next(cell for cell in FIGURES["fig16"].cells("tiny") if cell.row == "spotlight_color_index")
    rows = causal_rows(cell.setting, spotlight_color_index=(0.25, 0.75))
    directory = write_model(tmp_path, cell.setting, 1, rows, causal3dident.RESULTS)
    table = pd.read_csv(directory / "results.csv").replace({"spotlight_color_index": spelling})
    table.to_csv(directory / "results.csv", index=index)
    assert (directory / "results.csv").read_text().startswith("," * index + "ix,") and spelling in table.to_string()
    model = Model(cell.setting, 1, tmp_path)
    assert model.missing([causal3dident.RESULTS]) == []
    read = model.read(causal3dident.RESULTS)
    assert [row[cell.score] for row in read if cell.where.items() <= row.items()] == [0.75]


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures: what is tested are the numbers."""
    for name in ("plot_score_grid", "plot_side_by_side"):
        monkeypatch.setattr(report, name, lambda *args: next(a for a in args if isinstance(a, Path)).write_bytes(b"drawn"))


def table5_rows(scale, nonlinear, linear):
    """Rows of results.csv of Table 5, independent semantics."""
    setting = next(cell.setting for cell in FIGURES["table5"].cells(scale))
    return [(*keys.values(), linear, nonlinear) for keys in setting.experiment.result_rows(flags_of(setting))]


@pytest.fixture
def fast_models(tmp_path):
    """Folder with three models of Table 5, independent: nonlinear R² 0.9, 0.8, 1.0, linear −0.2, 0.1, 0.1."""
    setting = numeric_setting("fast", "independent", 8, 2)
    for seed, nonlinear, linear in ((1, 0.9, -0.2), (2, 0.8, 0.1), (3, 1.0, 0.1)):
        write_model(tmp_path / "models", setting, seed, table5_rows("fast", nonlinear, linear))
    return tmp_path / "models"


def test_the_report_has_mean_deviation_and_difference_and_counts_no_misprint(call, undrawn, fast_models, tmp_path):
    code, out, _ = call(f"report table5 --models {fast_models} --output {tmp_path}/report")
    assert code == 0
    table = pd.read_csv(tmp_path / "report/fast/table5.csv", keep_default_na=False, na_values=[""])
    cells = table.set_index(["metric", "semantics", "encoding", "factor"]).sort_index()
    row = cells.loc["r2_nonlinear", "independent", "hz_x", "s_1"]
    assert (row["mean"], row["std"], row["seeds"], row.paper, row.difference) == (0.9, 0.1, 3, 0.0, 0.9)
    row = cells.loc["r2_linear", "independent", "hz_x", "s_2"]  # −0.2 is clipped before it is averaged
    assert (row["mean"], row["paper"], row["difference"]) == (0.0667, 0.01, 0.0567)
    # the block s_3 … s_8 of independent semantics tells all of itself and nothing of the others
    unbiased = table.factor.isin([f"s_{i}" for i in range(3, 9)])
    computed = table[table.seeds > 0]
    assert (computed.theory == unbiased[computed.index].astype(float)).all() and table.theory[table.seeds == 0].isna().all()
    assert cells.loc["r2_linear", "independent", "hz_x", "s_2"].from_theory == 0.0667
    assert cells.loc["r2_nonlinear", "independent", "hz_x", "s_3"].from_theory == 0.1
    misprints = table[table.note == "paper: misprint"]
    assert set(misprints.factor) == {"s_9"} and sorted(misprints.paper) == [0.98, 0.99]
    assert misprints.difference.isna().all() and (misprints["mean"] == 0.9).all()
    assert cells.loc["r2_linear", "dependent"].seeds.eq(0).all()
    # linear: 0.0667 is within 0.1 of the twelve cells of either encoding that are near 0; nonlinear: 0.9 of the six near 1
    assert out.splitlines()[0] == (
        "fast scale: 48 of 96 cells computed, 0 of 46 lie within ±0.05 of the paper, 24 within ±0.1; "
        "2 cells are misprinted in the paper, not compared."
    )
    page = (tmp_path / "report/index.html").read_text()
    body = page[page.index("<body>") + 6 :].strip()
    assert body.startswith(f'<p class="first">{out.splitlines()[0]}</p>')
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>0.90</b> ± 0.10<br><small>paper 0.98 (-0.08)</small><br><small>theory 1.00</small>" in page
    assert "Independent semantics: 0 of 46 cells (0.0%) lie within ±0.05 of the paper, 24 (52.2%) within ±0.1" in page
    # 24 independent nonlinear cells: twelve unbiased ones hold with 0.9, the others do not
    assert "numeric: 12 of 24 cells (50.0%)" in page
    summary = pd.read_csv(tmp_path / "report/fast/summary.csv").iloc[0]
    assert (summary.independent_compared, summary["independent_within_0.1"]) == (46, 24)
    assert (summary.foretold, summary.as_foretold) == (24, 12)
    assert "ind_select_8_perturb_2_seed1 0.90, ind_select_8_perturb_2_seed2 0.80, ind_select_8_perturb_2_seed3 1.00" in page


def test_dependent_cells_are_held_against_what_the_block_tells_of_a_seed_s_factors(call, tmp_path):
    setting = numeric_setting("fast", "dependent", 8, 2)
    rows = {}
    for seed in (1, 2):
        latents = numeric.model_latents(setting, seed)
        rows[seed] = [(row["encoding"], row["predicted_factors"], *2 * [latents.identified_r2(row["predicted_factors"])])
                      for row in setting.experiment.result_rows(flags_of(setting))]  # fmt: skip
        write_model(tmp_path / "models", setting, seed, rows[seed])
    code, _, err = call(f"report table5 --models {tmp_path}/models --output {tmp_path}/report")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "report/fast/table5.csv").query("semantics == 'dependent'")
    told = {seed: {name: score for h, name, score, _ in rows[seed] if h == "hz_x"} for seed in rows}
    assert 0.1 < told[1]["s_0"] < 0.999 and told[1]["s_0"] != pytest.approx(told[2]["s_0"], abs=1e-3)
    row = table[(table.encoding == "hz_x") & (table.factor == "s_1")].iloc[0]
    assert row.theory == pytest.approx((told[1]["s_0"] + told[2]["s_0"]) / 2, abs=1e-4) and (table.from_theory == 0).all()
    summary = pd.read_csv(tmp_path / "report/fast/summary.csv").iloc[0]
    assert (summary["within_0.03_of_theory"], summary.from_theory) == (len(table), 0)
    assert (tmp_path / "report/fast/table5_beside_theory.png").exists()


def test_the_geometry_of_a_figure_s_models_is_drawn_against_the_bias(call, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("grids.geometry.plot_curves", lambda panels, deviations, path, title: (
        drawn.update({path.name: panels}), path.write_bytes(b"drawn")))  # fmt: skip
    monkeypatch.setattr("grids.report.draw", lambda *_: [])
    for selected, seed, size in ((1, 1, 0), (1, 2, 0), (3, 1, 0), (2, 1, 3)):
        setting = numeric_setting("tiny", "independent", selected, encoding_size=size)
        rows = [(*row.values(), 0.5, 0.5) for row in setting.experiment.result_rows(flags_of(setting))]
        write_model(tmp_path / "models", setting, seed, rows)
        place = tmp_path / "models" / setting.folder / f"{setting.name}_seed{seed}"
        numbers = {name: 0.1 * (i + selected + seed) for i, name in enumerate(GEOMETRY.scores)}
        pd.DataFrame([numbers]).to_csv(place / "geometry.csv", index=False)
    code, _, err = call(f"report fig3 fig8 table4 --models {tmp_path}/models --output {tmp_path}/report")
    assert code == 0, err
    assert list(drawn) == ["fig3_geometry.png"], "Figure 8 has the same models, and Table 4 one setting"
    table = pd.read_csv(tmp_path / "report/tiny/fig3_geometry.csv").query("side == 'independent semantics'")
    gap = table[table.metric == "modality gap"].set_index("setting")
    assert gap["mean"].dropna().to_dict() == pytest.approx({"{1}": 0.25, "[3]": 0.4})
    assert gap["std"]["{1}"] == pytest.approx(0.1 / 2**0.5, abs=1e-4) and gap.seeds.tolist() == [2, 0, 1, 0]
    recall = drawn["fig3_geometry.png"]["recall@1", "independent semantics"]
    assert recall.index.tolist() == ["images", "texts"] and recall.columns.tolist() == ["{1}", "[2]", "[3]", "[4]"]
    assert recall.loc["texts", "[3]"] == pytest.approx(0.1 * (GEOMETRY.scores.index("recall_t") + 4))


def test_scales_have_tables_of_their_own_and_fewer_semantics_are_not_compared(call, undrawn, fast_models, tmp_path):
    setting = numeric_setting("tiny", "independent", 3, 1)
    write_model(fast_models, setting, 1, table5_rows("tiny", 0.5, 0.5))
    code, out, _ = call(f"report table5 --models {fast_models} --output {tmp_path}/report")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["fast", "tiny", "report:"]
    tiny = pd.read_csv(tmp_path / "report/tiny/table5.csv")
    assert "paper" not in tiny and set(tiny["mean"].dropna()) == {0.5}
    assert (tmp_path / "report/fast/table5_beside_paper.png").exists()
    assert not (tmp_path / "report/tiny/table5_beside_paper.png").exists()
    models = pd.read_csv(tmp_path / "report/fast/models.csv")
    assert len(models) == 3 and set(models.train_seconds) == {2.5}


def test_mpi3d_is_reported_beside_the_paper_and_a_figure_without_its_numbers_alone(call, undrawn, tmp_path):
    for cell in FIGURES["fig13"].cells("fast"):
        where = [(0, modality, factor, 0.5, 1.0 if factor == "OBJ_COLOR" else -0.01)
                 for modality in ("image", "text") for factor in mpi3d.MPI3D_GRID]  # fmt: skip
        write_model(tmp_path / "models", cell.setting, 1, where, mpi3d.RESULTS)
    code, out, err = call(f"report mpi3d --models {tmp_path}/models --output {tmp_path}/report")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "report/fast/fig5.csv")
    computed = table[table.seeds > 0]
    assert set(computed.bias_type) == {"selection"} and set(computed.bias_id) == {0} and len(computed) == 14
    row = computed[(computed.factor == "OBJ_COLOR") & (computed.modality == "image")].iloc[0]
    assert (row["mean"], row.paper, row.difference) == (1.0, 1.0, 0.0)
    sizes = pd.read_csv(tmp_path / "report/fast/fig13.csv")
    assert len(sizes) == 56 and sizes.paper.isna().all() and (sizes.seeds == 1).all()
    assert "mpi3d: 14 of 14 cells (100.0%)" in (tmp_path / "report/index.html").read_text()
    assert "fast scale: 84 of 336 cells computed, 14 of 28 lie within ±0.05" in out
    assert not (tmp_path / "report/fast/fig13_beside_paper.png").exists()


def test_models_of_stand_in_images_are_reported_beside_the_paper(call, undrawn, tmp_path):
    """They have the paper's settings and factors; the counts are those of the CSVs, one by one."""
    shutil.copytree(REPOSITORY / "results/standin/models", tmp_path / "models")
    code, out, err = call(f"report causal3dident --scale tiny --models {tmp_path}/models --output {tmp_path}/report")
    assert code == 0, err
    paper = pd.read_csv(REPOSITORY / "paper/causal3dident.csv", keep_default_na=False)
    near = nearer = 0
    for name in ("fig6", "fig16", "fig17", "fig18"):
        table = pd.read_csv(tmp_path / f"report/tiny/{name}.csv", keep_default_na=False)
        both = table.merge(paper, on=["figure", "probe", "metric", "bias_type", "bias_id", "modality", "factor"])
        assert len(both) == len(table) and (both.paper == both["value"]).all()
        away = (both["mean"] - both["value"]).abs()
        near, nearer = near + (away <= 0.1 + 1e-9).sum(), nearer + (away <= 0.05 + 1e-9).sum()
        assert (tmp_path / f"report/tiny/{name}_beside_paper.png").exists()
    assert near > nearer > 0
    assert f"462 of 462 cells computed, {nearer} of 462 lie within ±0.05 of the paper, {near} within ±0.1" in out
    assert "image, stand-in shapes (tiny scale)" in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize("damage", [False, True])
def test_factors_that_captions_leave_out_are_blank_in_tables_and_pictures(call, tmp_path, monkeypatch, damage):
    """The real picture of Figure 16 beside the paper's, whose panels have no cell where a caption does not state a factor."""
    monkeypatch.setattr(report, "plot_score_grid", lambda panels, path, title: path.write_bytes(b"drawn"))
    setting = next(iter(FIGURES["fig16"].cells("fast"))).setting
    rows = causal_rows(setting, object_shape=(0.4, 1.0), text_phrasing=(0.2, None if damage else -0.1))
    write_model(tmp_path / "models", setting, 1, rows, causal3dident.RESULTS)
    code, _, err = call(f"report fig16 --models {tmp_path}/models --output {tmp_path}/report")
    if damage:  # a score that must be there is not
        assert code == 2 and "no finite mcc_mlp of text text_phrasing" in err and len(err.splitlines()) == 1
        return
    assert code == 0, err
    assert (tmp_path / "report/fast/fig16_beside_paper.png").stat().st_size > 10_000
    table = pd.read_csv(tmp_path / "report/fast/fig16.csv", keep_default_na=False, na_values=[""])
    row = table[(table.bias_type == "selections") & (table.bias_id == 0)].set_index("factor")
    assert row["mean"].to_dict() == {"object_shape": 1.0, "text_phrasing": -0.1}
    page = (tmp_path / "report/index.html").read_text()
    assert ">nan<" not in page and "1 of 2 cells" not in page and "2 of 2 cells" in page


@pytest.mark.parametrize(
    "damage", ["encoding,predicted_factors,r2_linear\n", "", "one row is missing", "a row is inf", "args.json"]
)
def test_a_damaged_file_is_named_and_not_averaged(call, undrawn, fast_models, tmp_path, damage):
    file = fast_models / "numeric-fast/ind_select_8_perturb_2_seed2/results.csv"
    whole = file.read_text()
    without_a_row = "\n".join(whole.splitlines()[:-1])
    damaged = {"one row is missing": without_a_row, "a row is inf": whole.replace("0.8\n", "inf\n", 1)}
    if damage == "args.json":
        file = file.with_name(damage)
        damaged[damage] = file.read_text()[:-9]
    file.write_text(damaged.get(damage, damage))
    answer = call(f"report table5 --models {fast_models} --output {tmp_path}/report")
    assert is_one_line_error(answer, str(file), "left out of the report")
    table = pd.read_csv(tmp_path / "report/fast/table5.csv")
    computed = table[table.seeds > 0]
    assert set(computed.seeds) == {2} and set(computed[computed.metric == "r2_nonlinear"]["mean"]) == {0.95}
    assert str(file) in (tmp_path / "report/index.html").read_text()
    if "row" not in damage:
        assert is_one_line_error(call(f"run table5 --scale fast --models {fast_models} --dry-run"), str(file))


@pytest.mark.parametrize("changed", [{"protocol": "paper"}, {"recipe": "paper"}, {"semantics_n": 4}])
def test_models_of_another_protocol_recipe_or_scale_are_refused(call, fast_models, tmp_path, changed):
    setting = numeric_setting("fast", "independent", 8, 2)
    write_model(fast_models, setting, 2, table5_rows("fast", 0.9, 0.9), **changed)
    name = next(iter(changed)).replace("_", "-")
    for command in (f"report table5 --output {tmp_path}/report", "run table5 --dry-run"):
        answer = call(f"{command} --scale fast --models {fast_models}")
        assert is_one_line_error(answer, "ind_select_8_perturb_2_seed2/args.json", f"--{name}")
    assert not (tmp_path / "report").exists()


def test_what_a_recipe_leaves_open_is_held_as_it_came_out(call, fast_models, tmp_path):
    """The steps and batches of the size of the encodings; the precision is the device's, if it is one that it decides."""
    setting, rows = numeric_setting("fast", "independent", 8, 2), table5_rows("fast", 0.9, 0.1)
    assert {name: expected_args(setting)[name] for name in ("train_steps", "final_batch_size", "precision")} == {
        "train_steps": 3000,
        "final_batch_size": 1200,
        "precision": "auto",
    }
    for precision in ("bf16", "fp32"):
        write_model(fast_models, setting, 2, rows, precision=precision)
        assert call(f"list table5 --scale fast --models {fast_models}")[0] == 0
    for changed in ({"train_steps": 10}, {"final_batch_size": 0}, {"precision": "tf32"}):
        write_model(fast_models, setting, 2, rows, **changed)
        flag = f"--{next(iter(changed)).replace('_', '-')} {next(iter(changed.values()))}, but"
        code, out, _ = call(f"list table5 --scale fast --models {fast_models}")
        assert code == 2 and "2 done" in out and "ind_select_8_perturb_2_seed2  damaged: " in out and flag in out
        for command in (f"report table5 --output {tmp_path}/report", "run table5 --dry-run"):
            assert is_one_line_error(call(f"{command} --scale fast --models {fast_models}"), flag)


def without(lines, number):
    return [line for i, line in enumerate(lines) if i != number]


DAMAGES = {
    "a row less": lambda lines: without(lines, 2),
    "a row twice": lambda lines: [*lines, lines[2]],
    "a row instead of another": lambda lines: [*without(lines, 2), lines[-1]],
    "a word": lambda lines: [*lines[:-1], re.sub("[^,]+$", "high", lines[-1])],
    "NaN": lambda lines: [*lines[:-1], re.sub("[^,]+$", "NaN", lines[-1])],
    "nothing": lambda lines: [*lines[:-1], re.sub("[^,]+$", "", lines[-1])],
    "no row": lambda lines: lines[:1],
    "a number cut short": lambda lines: [*lines[:-1], lines[-1][:-1]],  # and with it the end of the line
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["results.csv", "results_predict.csv", "results_classify.csv"])
def test_results_that_are_not_whole_do_not_count_anywhere(call, undrawn, tmp_path, monkeypatch, file, damage):
    figure = "fig3" if file == "results.csv" else "fig4"
    setting, words = numeric_setting("tiny", "independent", 1), f"{figure} --scale tiny --models {tmp_path}/models"
    rows = [(*keys.values(), 0.5, 0.5) for keys in setting.experiment.result_rows(flags_of(setting))]
    for seed in (1, 2):
        write_model(tmp_path / "models", setting, seed, rows)
        write_model(tmp_path / "models", setting, seed, [(task, 0.5) for task in numeric.TASKS], PREDICT)
        directory = write_model(tmp_path / "models", setting, seed, [(0.5, 0.5)], CLASSIFY)
    assert "2 done" in call(f"list {words}")[1]
    lines = (directory / file).read_text().splitlines()
    if file == "results_classify.csv" and "row" in damage:
        lines = [lines[0], *({"no row": 0, "a row less": 0}.get(damage, 2) * lines[1:])]
    else:
        lines = DAMAGES[damage](lines)
    (directory / file).write_text("\n".join(lines) + "\n" * (damage != "a number cut short"))
    for named in (figure, "numeric"):
        code, out, _ = call(f"list {words.replace(figure, named, 1)}")
        assert code == 2 and "1 done" in out and f"{directory}  damaged: {directory / file} is damaged" in out
    code, out, err = call(f"run {words} --dry-run")
    assert code == 2 and err.count("\n") == 1 and f"seed2 is damaged and was left alone: {directory / file}" in err
    assert "24 models, 1 are done, 1 damaged, 22 to do" in out and len(out.splitlines()) == 23
    monkeypatch.setattr(report, "plot_score_curves", lambda *args: args[-2].write_bytes(b"drawn"))
    answer = call(f"report {words} --output {tmp_path}/report")
    assert is_one_line_error(answer, str(directory / file), "left out of the report")
    table = pd.read_csv(tmp_path / f"report/tiny/{figure}.csv")
    if figure == "fig3":
        assert set(table.seeds) == {0, 1}
    else:  # the other file of the same model is whole
        lost = table.metric == ("r2" if file == "results_predict.csv" else "mcc")
        assert set(table[lost].seeds) == {0, 1} and set(table[~lost].seeds) == {0, 2}


def test_scores_that_do_not_apply_may_be_empty_and_no_others(tmp_path):
    [cell] = itertools.islice(FIGURES["fig6"].cells("tiny"), 1)
    model = Model(cell.setting, 1, tmp_path)
    write_model(tmp_path, cell.setting, 1, causal_rows(cell.setting), causal3dident.RESULTS)
    assert model.missing([causal3dident.RESULTS]) == []
    for factor, scores in (("object_shape", (None, 0.5)), ("spotlight_pos", (0.5, None)), ("spotlight_pos", ("x", 1))):
        rows = causal_rows(cell.setting, **{factor: scores})
        write_model(tmp_path, cell.setting, 1, rows, causal3dident.RESULTS)
        with pytest.raises(InputError, match=f"no finite .* of image {factor}"):
            model.missing([causal3dident.RESULTS])
    rows = [(*row[:3], "discrete", *row[4:]) for row in causal_rows(cell.setting)]
    write_model(tmp_path, cell.setting, 1, rows, causal3dident.RESULTS)
    with pytest.raises(InputError, match="no finite mcc_logreg of image object_alpharot"):
        model.missing([causal3dident.RESULTS])


def test_a_finished_model_without_any_of_its_weights_does_not_count(call, undrawn, fast_models, tmp_path):
    directory = fast_models / "numeric-fast/ind_select_8_perturb_2_seed2"
    weights = sorted(directory.glob("*.pt"))
    assert len(weights) > 1
    weights.pop().unlink()
    assert "3 done" in call(f"list table5 --scale fast --models {fast_models}")[1]
    for path in weights:
        path.unlink()
    code, out, _ = call(f"list table5 --scale fast --models {fast_models}")
    assert code == 2 and "2 done" in out and f"{directory}  damaged: {directory} has none of its weights" in out
    answer = call(f"run table5 --scale fast --models {fast_models} --dry-run")
    assert is_one_line_error(answer, "seed2 is damaged", "weights") and "2 are done, 1 damaged, 3 to do" in answer[1]
    answer = call(f"report table5 --scale fast --models {fast_models} --output {tmp_path}/report")
    assert is_one_line_error(answer, str(directory), "weights", "left out of the report")
    assert set(pd.read_csv(tmp_path / "report/fast/table5.csv").seeds) == {0, 2}
    assert set(pd.read_csv(tmp_path / "report/fast/models.csv").model.str[-1]) == {"1", "3"}


def test_a_copy_of_a_published_model_counts_without_weights_and_another_of_its_name_does_not(tmp_path):
    published = REPOSITORY / "results/standin/models"
    shutil.copytree(published, tmp_path / "models")
    needed = needed_models(chosen_figures(["causal3dident"]), "tiny", 1, tmp_path / "models")
    lacking, damaged = models.checked(needed)
    assert len(lacking) == len(needed) and not any(lacking.values()) and not damaged
    model = next(iter(needed))
    stored = json.loads((model.directory / "args.json").read_text())
    (model.directory / "args.json").write_text(json.dumps(stored | {"started": "later"}))
    assert list(models.checked(needed)[1]) == [model]


def test_a_damaged_model_is_a_failure_and_the_others_are_trained(fake, call):
    fake(good="--steps 2")
    assert call("run good --scale tiny --seeds 3")[0] == 0
    models = Path("models/fake-tiny")
    (models / "good_seed1/args.json").write_text("{")
    (models / "good_seed2/results.csv").write_text("factor,score\n")
    shutil.rmtree(models / "good_seed3")
    code, out, err = call("run good --scale tiny --seeds 3")
    assert code == 2 and "3 models, 0 are done, 2 damaged, 1 to do" in out and "good_seed3 done" in out
    first, second = err.splitlines()
    assert first.startswith("good_seed1 is damaged and was left alone: models/fake-tiny/good_seed1/args.json")
    assert second.startswith("good_seed2 is damaged and was left alone: models/fake-tiny/good_seed2/results.csv")
    assert (starts("good_seed2"), (models / "good_seed1/args.json").read_text()) == (1, "{")
    code, out, _ = call("list good --scale tiny")
    assert code == 2 and re.findall(r"good_seed\d  (\w+)", out) == ["damaged", "damaged", "done"] and "1 done" in out


def test_a_digit_that_was_changed_after_the_evaluation_is_noticed(tmp_path):
    setting = numeric_setting("fast", "independent", 8, 2)
    write_model(tmp_path, setting, 1, table5_rows("fast", 0.9, 0.1))
    model, file = Model(setting, 1, tmp_path), RESULTS
    path = model.directory / file.name
    args = json.loads((model.directory / "args.json").read_text())
    (model.directory / "args.json").write_text(json.dumps(args | {"files": {file.name: digest(path)}}))
    assert len(model.read(file)) > 20
    path.write_text(path.read_text().replace("0.9", "0.8", 1))
    with pytest.raises(InputError, match=r"results.csv is damaged: its evaluation wrote another"):
        model.read(file)


def test_whatever_is_text_is_escaped_in_the_report(fake, call, undrawn, monkeypatch):
    fake(good="--steps 1")
    evil = "<script>&'\""
    [cell] = figures.FIGURES["good"].cells("tiny")
    cells = [
        dataclasses.replace(cell, panel=(evil, evil), row=evil, column=evil, learned=False),
        dataclasses.replace(cell, panel=(evil, evil), row="s", column="s"),
    ]
    figure = dataclasses.replace(figures.FIGURES["good"], title=evil, experiment=evil, name="x<i>1", make_cells=lambda *_: cells)
    figures.FIGURES.update(good=figure)
    assert call("run good --scale tiny --seeds 2")[0] == 0
    Path("models/fake-tiny/good_seed2/results.csv").write_text("<script>,score\n")
    Path("models").rename("<script>models")
    monkeypatch.setattr(report, "ABSENT", -1)
    code, _, err = call("report good --models <script>models")
    assert code == 2 and "<script>models/fake-tiny/good_seed2/results.csv is damaged" in err
    page = Path("report/index.html").read_text()
    assert "<script" not in page and "<i>" not in page and evil not in page
    assert page.count("&lt;script&gt;") >= 8 and "Left out: &lt;script&gt;models" in page


def test_models_of_an_earlier_version_with_fewer_flags_count_as_trained_without_them(tmp_path):
    setting = numeric_setting("paper", "independent", 8, 2)
    directory = write_model(tmp_path, setting, 2, [])
    stored = json.loads((directory / "args.json").read_text())
    model = Model(setting, 2, tmp_path)
    assert stored.pop("optimiser") == "adam"
    (directory / "args.json").write_text(json.dumps(stored))
    assert model.stored()["optimiser"] == "adam"
    del stored["lr"]
    (directory / "args.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="has no 'lr'"):
        model.stored()


def test_downstream_scores_are_drawn_as_curves_and_a_correlation_may_be_negative(call, tmp_path):
    for selected in range(1, 5):
        setting = numeric_setting("tiny", "independent", selected)
        tasks = [(f"y{i}", 0.1 * selected) for i in range(1, 5)]
        write_model(tmp_path / "models", setting, 1, tasks, PREDICT)
        write_model(tmp_path / "models", setting, 1, [(-0.25, 0.5)], CLASSIFY)
    assert call(f"report fig4 --models {tmp_path}/models --output {tmp_path}/report")[0] == 0
    table = pd.read_csv(tmp_path / "report/tiny/fig4.csv")
    assert set(table[table.task == "id"]["mean"].dropna()) == {-0.25}
    assert table[(table.task == "y2") & (table.semantics == "independent")]["mean"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert (tmp_path / "report/tiny/fig4.png").stat().st_size > 10_000
    write_model(tmp_path / "models", setting, 1, tasks, PREDICT, downstream={"protocol": "paper"})
    assert is_one_line_error(call(f"report fig4 --models {tmp_path}/models --output {tmp_path}/report"), "protocol paper")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here to open the report in")
def test_the_report_opens_in_a_browser(call, fast_models, tmp_path):
    assert call(f"report table5 --models {fast_models} --output {tmp_path}/report")[0] == 0
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    opened = subprocess.run([*command, "--dump-dom", f"file://{tmp_path}/report/index.html"], capture_output=True,
                            text=True, timeout=120, check=True)  # fmt: skip
    assert "48 of 96 cells computed" in opened.stdout and "paper: misprint" in opened.stdout
    screenshot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={screenshot}", f"file://{tmp_path}/report/index.html"], capture_output=True,
                   timeout=120, check=True)  # fmt: skip
    assert screenshot.stat().st_size > 10_000


def test_a_model_of_another_seed_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    setting = numeric_setting("tiny", "independent", 1)
    write_model(tmp_path, setting, 1, []).rename(Model(setting, 2, tmp_path).directory)
    with pytest.raises(InputError, match="has --seed 1, but ind_select_1_seed2 at tiny scale has 2"):
        Model(setting, 2, tmp_path).stored()


@pytest.mark.parametrize("changed", [{"probes": "paper"}, {"num_eval_batches": 5}, {"precision": "bf16"}, {"protocol": "paper"}])
def test_downstream_scores_that_were_made_otherwise_do_not_count(tmp_path, changed):
    setting = numeric_setting("tiny", "independent", 1)
    write_model(
        tmp_path, setting, 1, [(task, 0.5) for task in TASKS], PREDICT, downstream={**PREDICT.recorded["tiny"], **changed}
    )
    [(name, value)] = changed.items()
    with pytest.raises(InputError, match=f"was made with {name} {value}"):
        Model(setting, 1, tmp_path).read(PREDICT)


def test_an_unfinished_model_with_results_of_before_does_not_count(tmp_path):
    setting = numeric_setting("tiny", "independent", 1)
    rows = [(*keys.values(), 0.5, 0.5) for keys in setting.experiment.result_rows(models.flags_of(setting))]
    write_model(tmp_path, setting, 1, rows, finished=False)
    assert Model(setting, 1, tmp_path).missing([numeric.RESULTS]) == [numeric.RESULTS]


def test_the_distance_from_the_theory_is_that_of_each_seed(tmp_path, call, undrawn):
    """Seeds that err to either side do not cancel."""
    setting = numeric_setting("fast", "independent", 8, 2)
    for seed, score in ((1, 0.3), (2, 0.1)):
        write_model(tmp_path / "models", setting, seed, table5_rows("fast", score, score))
    cells = [dataclasses.replace(cell, theory=lambda seed: 0.2) for cell in figures.FIGURES["table5"].cells("fast")]
    figure = dataclasses.replace(figures.FIGURES["table5"], make_cells=lambda *_: cells)
    results = {}
    table = report.measured(figure, "fast", lambda s, f: report.read_results(tmp_path / "models", results, s, f))
    computed = table[table.seeds > 0]
    assert len(computed) and np.allclose(computed.from_theory, 0.1)


def test_a_reader_of_a_model_settles_it_first(tmp_path):
    """Killed between args.json, which names the new results, and their move to their places."""
    setting = numeric_setting("tiny", "independent", 1)
    rows = [(*keys.values(), 0.5, 0.5) for keys in setting.experiment.result_rows(models.flags_of(setting))]
    directory = write_model(tmp_path, setting, 1, rows)
    staged = directory / staging.STAGED
    staged.mkdir()
    (directory / "results.csv").rename(staged / "results.csv")
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, "eval_seed": 2, "files": staging.digests(staged)}))
    assert Model(setting, 1, tmp_path).missing([numeric.RESULTS]) == []

"""Models on disk: what is trained, where it lies, whether it is whole, and the commands that make what it lacks."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import pandas as pd

from running.command_line import InputError
from running.directory import LATER_DOWNSTREAM, LATER_FLAGS, stored_args
from running.files import read_csv
from running.staging import is_recorded, settle

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = "results/standin/models"  # models without their weights
SCALES = {
    "paper": "the paper's runs: its dimensions, settings, recipe and steps, with --protocol code",
    "fast": "the paper's dimensions and settings, trained with the fast recipe",
    "tiny": "a smaller problem: four semantics, or stand-in images",
}
COMPARED = ("paper", "fast")  # scales of the paper's dimensions, whose numbers stand beside the paper's
BLENDER = ".venv-blender/bin/python"  # interpreter of the scripts that render


@dataclasses.dataclass(frozen=True, eq=False)
class ResultFile:
    """A CSV in a model directory, with the columns `keys`, which tell its rows apart, and `scores`, which are numbers.

    applies: where some scores do not apply to some rows, dict factor_type → prefix of those that do; rows: the keys of every
    row, none: those that the experiment names; spelling: dict of another spelling of a key → the one that is read. A file that
    the training does not write has a script and dict scale → its flags, if any, and the name of the record of how it was made
    in args.json, and dict scale → what this must hold.
    """

    name: str
    keys: tuple
    scores: tuple
    applies: dict = dataclasses.field(default_factory=dict)
    rows: tuple = ()
    spelling: dict = dataclasses.field(default_factory=dict)
    script: str = ""
    flags: dict = dataclasses.field(default_factory=dict)
    record: str = ""
    recorded: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What models are trained on: its last file, and the commands (a script, after BLENDER if that runs it) or its source."""

    file: str
    commands: tuple = ()
    source: str = ""

    def missing(self):
        """Commands (lists of words) that make the data set, none if it is there; InputError if only a user can get it."""
        if Path(self.file).exists():
            return []
        if not self.commands:
            raise InputError(f"{self.file} is missing: {self.source}")
        split = map(str.split, self.commands)
        commands = [words if words[0] == BLENDER else [sys.executable, *words] for words in split]
        if lost := [python for python, *_ in commands if not (ROOT / python).exists()]:
            raise InputError(f"{self.file} is missing, and {lost[0]}, which renders it; `make blender` installs that")
        return [[str(ROOT / python), str(ROOT / script), *flags] for python, script, *flags in commands]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, but for the seed: the class of the experiment, and its training script with flags."""

    experiment: type
    scale: str
    name: str
    script: str
    flags: str
    data: DataSet | None = None

    @property
    def folder(self):
        """Name of the folder of all models of this experiment and scale."""
        return self.experiment.name if self.scale == "paper" else f"{self.experiment.name}-{self.scale}"


@functools.cache
def flags_of(setting):
    """Namespace of all flags of a model of this setting; only the precision may be "auto": the device decides it."""
    args, _ = setting.experiment.parse_flags(setting.flags.split())
    setting.experiment.settle(args)
    return args


@functools.cache
def expected_args(setting):
    """Dict of what args.json of a model of this setting holds: every flag but the seed on which a result depends."""
    free = setting.experiment.parser().freely | {"seed"}
    return {name: value for name, value in vars(flags_of(setting)).items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Model:
    """A setting and a seed, with its place under `models`: the `directory` called `name`."""

    setting: Setting
    seed: int
    models: Path

    @property
    def name(self):
        return f"{self.setting.name}_seed{self.seed}"

    @property
    def directory(self):
        return self.models / self.setting.folder / self.name

    def log(self, suffix=".log"):
        """Path of the log, or of another file that goes with the model's jobs."""
        return self.models / "logs" / self.setting.folder / f"{self.name}{suffix}"

    def stored(self):
        """Dict of args.json, {} if there is none; InputError if it is damaged or of another setting, recipe or scale."""
        file = self.directory / "args.json"
        if not file.exists():
            return {}
        settle(self.directory)
        stored = LATER_FLAGS | stored_args(self.directory)
        for name, value in (expected_args(self.setting) | {"seed": self.seed}).items():
            if name not in stored:
                raise InputError(f"{file} has no {name!r}: it is damaged, or another script's; move the model away")
            if stored[name] != value and (value, stored[name]) not in (("auto", "fp32"), ("auto", "bf16")):
                other = f"{self.name} at {self.setting.scale} scale has {value}"
                cure = "move the model away, or name another folder with --models"
                raise InputError(f"{file} has --{name.replace('_', '-')} {stored[name]}, but {other}; {cure}")
        return stored

    def finished(self):
        """Whether it is trained and evaluated; InputError as `stored`, and if it is not published and no weights are left."""
        if not self.stored().get("finished"):
            return False
        published = ROOT / PUBLISHED / self.setting.folder / self.name / "args.json"
        weights = self.setting.experiment.weight_files
        is_published = published.exists() and published.read_bytes() == (self.directory / "args.json").read_bytes()
        if not is_published and not any((self.directory / name).exists() for name in weights):
            raise InputError(f"{self.directory} has none of its weights ({', '.join(weights)}); move it away to train it again")
        return True

    def missing(self, files):
        """Those of `files` that this model does not have yet; InputError that names what is damaged."""
        if not self.finished():
            return list(files)
        missing = [file for file in files if not (self.directory / file.name).exists()]
        for file in files:
            if file not in missing:
                self.read(file)
        return missing

    def read(self, file):
        """Rows (dicts) of a ResultFile, scores as floats; InputError that names it if it is not whole or made otherwise."""
        path, setting = self.directory / file.name, self.setting
        if file.record:
            record = self.stored().get(file.record)
            for name, value in file.recorded[setting.scale].items():
                made = (LATER_DOWNSTREAM | record).get(name) if isinstance(record, dict) else None
                if made != value:
                    wanted = f"the {setting.scale} scale has {value}; remove it and `run` makes it again"
                    raise InputError(f"{path} was made with {name} {made}, and {wanted}")
        table = read_csv(path, (*file.keys, *file.scores), gaps=True, ended=True).replace(file.spelling)
        scores = {name: pd.to_numeric(table[name], errors="coerce") for name in file.scores}
        rows = table.assign(**scores).to_dict("records")
        for keys in file.rows or setting.experiment.result_rows(flags_of(setting)):
            found = [row for row in rows if keys.items() <= row.items()]
            wrong = ["expected one row"]
            if len(found) == 1:
                prefix = file.applies.get(found[0].get("factor_type"), "")
                gaps = [score for score in file.scores if not math.isfinite(found[0][score])]
                wrong = [f"no finite {score}" for score in gaps if score.startswith(prefix)]
            if wrong:
                row = " ".join(keys.values()) or "the model"
                raise InputError(f"{path} is damaged: {wrong[0]} of {row}; remove it and make it again")
        if not is_recorded(path):
            raise InputError(f"{path} is damaged: its evaluation wrote another; remove it and make it again")
        return rows

    def commands(self, files, gpus=1):
        """Commands that make `files`: lists of words, the training first, on so many GPUs by torchrun, each script once."""
        setting, commands = self.setting, {}
        place = ["--model-dir", str(self.directory.parent), "--model-id", self.name]
        if not self.finished():
            commands[setting.script] = [*setting.flags.split(), *place, "--seed", str(self.seed), "--resume"]
        for file in files:
            if file.script:
                flags = file.flags.get(setting.scale, "").split()
                commands[file.script] = ["--model-id", str(self.directory), *flags, "--overwrite"]
            elif setting.script not in commands:  # trained, but the file is gone
                commands[setting.script] = [*place, "--seed", str(self.seed + 1), "--evaluate"]
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        several = {setting.script: several} if not self.finished() else {}
        return [[sys.executable, *several.get(script, []), str(ROOT / script), *flags] for script, flags in commands.items()]


def checked(needed):
    """(lacking, damaged) of a dict Model → ResultFiles: Model → those that it lacks, and Model → what is wrong with it."""
    lacking, damaged = {}, {}
    for model, files in needed.items():
        try:
            lacking[model] = model.missing(files)
        except InputError as error:
            damaged[model] = str(error)
    return lacking, damaged

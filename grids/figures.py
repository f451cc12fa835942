"""All figures and tables, and the models that they need. A new experiment is a module with FIGURES, and one word here."""

from pathlib import Path

from grids import causal3dident, mpi3d, numeric
from grids.models import Model
from running.command_line import InputError

EXPERIMENTS = (numeric, mpi3d, causal3dident)
_FIGURES = [figure for experiment in EXPERIMENTS for figure in experiment.FIGURES]
FIGURES = {figure.name: figure for figure in sorted(_FIGURES, key=lambda figure: (figure.name[0], figure.number))}
GROUPS = {"all": list(FIGURES)}
for _name, _figure in FIGURES.items():
    GROUPS.setdefault(_figure.experiment, []).append(_name)


def chosen_figures(names):
    """Figures of the names and groups given, each once; InputError for an unknown name."""
    chosen = {}
    for name in names:
        if name not in FIGURES and name not in GROUPS:
            raise InputError(f"{name!r} is no figure; expected one of {', '.join([*FIGURES, *GROUPS])}")
        chosen |= {member: FIGURES[member] for member in GROUPS.get(name, [name])}
    return list(chosen.values())


def needed_models(figures, scale, seeds, models):
    """Dict Model → list of ResultFiles: all that the figures need, each model once."""
    needed = {}
    for figure in figures:
        for cell in figure.cells(scale):
            for seed in range(1, seeds + 1):
                files = needed.setdefault(Model(cell.setting, seed, Path(models)), [])
                if cell.file not in files:
                    files.append(cell.file)
    return needed

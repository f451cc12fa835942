"""What the paper's tables and figures are made of."""

import dataclasses
import re
from collections.abc import Callable

from grids.models import COMPARED, ResultFile, Setting


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a figure.

    keys: its key in the paper's CSV; panel (row, column), row and column: where it is drawn; file, where, score: the CSV,
    the values that pick its row and the column to read; learned: whether the theory has the factor identified (True) or
    absent (False), None where it says neither; clipped: to [0, 1], as R² is in the paper and a correlation is not; theory:
    the number that the theory gives a seed, a function of it, None where it gives none.
    """

    keys: dict
    panel: tuple
    row: str
    column: str
    setting: Setting
    file: ResultFile
    where: dict
    score: str
    learned: bool | None = None
    clipped: bool = True
    theory: Callable | None = None

    @property
    def source(self):
        """Where the number stands, in words: what figures share is known by it."""
        return f"{self.setting.name} {' '.join(map(str, self.where.values()))}"


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A figure or table of the paper, named fig3 or table4; its cells are what its experiment makes of the options.

    experiment: its name; make_cells(figure, scale): iterable of Cells; paper: CSV of the paper's numbers, if it prints any;
    curves: whether it is drawn as curves; compared: the scales whose numbers stand beside the paper's; standin: what its images
    are at scale tiny, in words.
    """

    name: str
    title: str
    experiment: str
    make_cells: Callable
    paper: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    curves: bool = False
    compared: tuple = COMPARED
    standin: str = ""

    @property
    def number(self):
        return int(re.sub(r"\D", "", self.name))

    def titled(self, scale):
        """Its title, with what stands in for its images."""
        return f"{self.title}, {self.standin}" if scale == "tiny" and self.standin else self.title

    def cells(self, scale):
        return list(self.make_cells(self, scale))

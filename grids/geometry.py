"""Over a figure's settings, where the encodings lie: modality gap, alignment, uniformity and recall against the bias."""

import pandas as pd

from grids.models import ResultFile
from running.files import write_csv
from running.pictures import plot_curves

# A row of panels each: its title, and which columns of geometry.csv are its curves.
CURVES = {
    "modality gap": {"between the centres": "modality_gap"},
    "alignment": {"of pairs": "alignment"},
    "uniformity": {"images": "uniformity_x", "texts": "uniformity_t"},
    "recall@1": {"images": "recall_x", "texts": "recall_t"},
}
GEOMETRY = ResultFile("geometry.csv", (), tuple(name for curves in CURVES.values() for name in curves.values()), rows=({},))


def places_of(figure, scale):
    """Tuple of the (side, setting in words, Setting) of a figure, in order; a table's columns are factors of one setting."""
    return tuple(dict.fromkeys((cell.panel[1], cell.column, cell.setting) for cell in figure.cells(scale)))


def measured_geometry(figure, scale, results):
    """DataFrame of the geometry of a figure's models: side, setting (in words), metric, curve, mean, std (n − 1), seeds.

    results(setting, file) gives dict Model → rows. Empty unless some model has a geometry.csv, and for a table.
    """
    records, places = [], places_of(figure, scale)
    if len({setting for _, _, setting in places}) <= len({side for side, _, _ in places}):  # a table
        places = ()
    for side, column, setting in places:
        found = [row for (row,) in results(setting, GEOMETRY).values()]
        for metric, curves in CURVES.items():
            for curve, name in curves.items():
                values = pd.Series([row[name] for row in found], dtype=float)
                records.append((side, column, metric, curve, values.mean(), values.std(), len(values)))
    table = pd.DataFrame(records, columns=["side", "setting", "metric", "curve", "mean", "std", "seeds"])
    return table if table.seeds.any() else table[:0]


def write_geometry(figure, scale, results, folder, drawn):
    """Write {figure}_geometry.csv and .png into a folder; returns the list of the picture's path.

    Empty where no model has a geometry.csv, and where a figure of the same models is in `drawn`, a set that is added to.
    """
    table, places = measured_geometry(figure, scale, results), places_of(figure, scale)
    if table.empty or places in drawn:
        return []
    drawn.add(places)
    write_csv(table.round(4), folder / f"{figure.name}_geometry.csv")
    panels, deviations = {}, {}
    for (metric, side), part in table.groupby(["metric", "side"], sort=False):
        for kept, value in ((panels, "mean"), (deviations, "std")):
            curves = part.pivot(index="curve", columns="setting", values=value)
            kept[metric, side] = curves.loc[part.curve.unique(), part.setting.unique()]
    path = folder / f"{figure.name}_geometry.png"
    plot_curves(panels, deviations, path, f"{figure.name}: where the encodings lie — {scale} scale")
    return [path]

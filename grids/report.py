"""The report of reproduce.py: from the models on disk to tables, pictures and one page, beside the paper's numbers."""

import base64
import functools
import html
import math
from pathlib import Path

import pandas as pd

from grids.figures import chosen_figures
from grids.geometry import write_geometry
from grids.models import ROOT, SCALES, Model
from probes import ABSENT, LEARNED
from running.command_line import InputError
from running.directory import stored_args
from running.files import write_bytes, write_csv
from running.pictures import plot_score_curves, plot_score_grid, plot_side_by_side

HIDDEN = ["panel", "row", "column", "learned", "source", "runs"]  # columns that no CSV shows
CLOSE, NEAR = 0.05, 0.1  # differences from the paper's numbers
AS_THEORY = 0.03  # a difference from the theory's number
# Table 5 prints 0.98 and 0.99 where the theory and its linear rows have 0
MISPRINTED = {"table": 5, "metric": "r2_nonlinear", "semantics": "independent", "factor": "s_9"}


def read_results(models, damaged, setting, file):
    """Dict Model → rows of a ResultFile, of each finished Model of a setting; what is wrong with others are keys of `damaged`."""
    prefix, results = f"{setting.name}_seed", {}
    seeds = [path.name.removeprefix(prefix) for path in (Path(models) / setting.folder).glob(f"{prefix}*")]
    for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
        model = Model(setting, seed, Path(models))
        try:
            if (model.directory / "args.json").exists():
                stored_args(model.directory)
        except InputError as error:
            damaged[str(error)] = model
            continue
        model.stored()  # one of another setting, recipe or scale is not left out: the report ends with it
        try:
            if model.finished() and (model.directory / file.name).exists():
                results[model] = model.read(file)
        except InputError as error:
            damaged[str(error)] = model
    return results


def measured(figure, scale, results):
    """DataFrame of a figure's cells: keys, mean, std (n − 1), seeds, and at scales that are compared paper, difference, note.

    Where the theory gives numbers also theory, the mean over the seeds, and from_theory, the mean distance from it of a seed.
    """
    records, cells = [], figure.cells(scale)
    for cell in cells:
        found = results(cell.setting, cell.file).items()
        rows = {model.name: next(row for row in rows if cell.where.items() <= row.items()) for model, rows in found}
        values = pd.Series({name: row[cell.score] for name, row in rows.items()}, dtype=float)
        values = values.clip(0, 1) if cell.clipped else values
        hidden = {name: getattr(cell, name, values.to_dict()) for name in HIDDEN}
        record = {**cell.keys, "mean": values.mean(), "std": values.std(), "seeds": len(values)}
        if cell.theory:
            theory = pd.Series({model.name: cell.theory(model.seed) for model, _ in found}, dtype=float)
            record |= {"theory": theory.mean(), "from_theory": (values - theory).abs().mean()}
        records.append({**record, **hidden})
    table = pd.DataFrame(records)
    if scale not in figure.compared:
        return table
    if figure.paper:
        paper = pd.read_csv(ROOT / "paper" / figure.paper, keep_default_na=False).rename(columns={"value": "paper"})
        table = table.merge(paper, on=list(cells[0].keys), how="left", validate="one_to_one")
    else:
        table["paper"] = math.nan
    misprinted = pd.Series([MISPRINTED.items() <= cell.keys.items() for cell in cells])
    table["difference"] = (table["mean"] - table.paper).mask(misprinted)
    table["note"] = misprinted.map({True: "paper: misprint", False: ""})
    return table


def summarise(tables, scale):
    """DataFrame of one row a figure: cells, computed, seeds; how many are how near the paper, how many as foretold."""
    rows = []
    for figure, table in tables.items():
        computed = (table.seeds > 0).sum()
        row = {"figure": figure.name, "scale": scale, "cells": len(table), "computed": computed, "seeds": seeds_in_words(table)}
        if scale in figure.compared:
            for name in ["", "independent_"] if "semantics" in table else [""]:
                away = distances(table[table.semantics == "independent"] if name else table)
                row[f"{name}compared"] = away.count()
                row |= {f"{name}within_{bound}": (away <= bound).sum() for bound in (CLOSE, NEAR)}
            row["misprints"] = (table.note != "").sum()
        if "from_theory" in table:
            away = table[table.semantics == "dependent"].from_theory.dropna()
            row |= {f"within_{AS_THEORY}_of_theory": (away <= AS_THEORY).sum(), "from_theory": round(away.mean(), 4)}
        if len(cells := foretold([table])):
            row |= {"foretold": len(cells), "as_foretold": cells.holds.sum()}
        rows.append(row)
    return pd.DataFrame(rows).convert_dtypes()


def distances(table):
    """Series of the cells' distances from the paper, NaN where there is none or it is misprinted."""
    return table.difference.abs().round(9)


def seeds_in_words(table):
    """The number of seeds of a figure's cells, or the least and the most."""
    return "–".join(map(str, sorted({table.seeds.min(), table.seeds.max()})))


def counts(summary):
    """Series of a summary's counts over all figures."""
    return summary.drop(columns="from_theory", errors="ignore").sum(numeric_only=True)


def counts_in_words(summary, scale):
    """How many cells are computed, and how many of them are near the paper's numbers."""
    total = counts(summary)
    words = f"{total.computed} of {total.cells} cells computed"
    if not total.get("compared"):
        return f"{words} (a smaller problem, not compared with the paper)"
    near, nearer = total[f"within_{NEAR}"], total[f"within_{CLOSE}"]
    words += f", {nearer} of {total.compared} lie within ±{CLOSE} of the paper, {near} within ±{NEAR}"
    return words + (f"; {total.misprints} cells are misprinted in the paper, not compared" if total.misprints else "")


def foretold(tables):
    """DataFrame of the computed cells that the theory has LEARNED or ABSENT, each number once; `holds`: whether they are so."""
    cells = pd.concat(tables, ignore_index=True)
    cells = cells[cells.learned.notna() & (cells.seeds > 0)].drop_duplicates("source")
    return cells.assign(holds=(cells["mean"] >= LEARNED).where(cells.learned.astype(bool), cells["mean"] <= ABSENT))


def durations(figures, scale, results):
    """DataFrame of the models behind the figures: seconds of training and of evaluation, and the device."""
    cells, columns = [cell for figure in figures for cell in figure.cells(scale)], ["train_seconds", "eval_seconds", "device"]
    found = dict.fromkeys(model for cell in cells for model in results(cell.setting, cell.file))
    rows = [[model.name, scale, *map(model.stored().get, columns)] for model in found]
    return pd.DataFrame(rows, columns=["model", "scale", *columns])


def panels_of(table, value):
    """Dict panel → DataFrame (rows × columns of the panel) of a table's column; NaN or "" where captions state no factor."""
    panels = {}
    for panel, part in table.groupby("panel", sort=False):
        pivoted = part.pivot(index="row", columns="column", values=value).loc[part.row.unique(), part.column.unique()]
        panels[panel] = pivoted if table[value].dtype.kind in "biuf" else pivoted.fillna("")
    return panels


def printed_decimals(table):
    """The decimals that the paper prints of a figure's numbers."""
    return max((len(str(value).partition(".")[2]) for value in table.paper.dropna()), default=0)


def draw(figure, table, scale, folder):
    """Draw a figure in the paper's arrangement, and beside the paper's at scales that are compared; returns the PNGs' paths."""
    seeds = seeds_in_words(table[table.seeds > 0])
    title = f"{figure.name}: {figure.titled(scale)} — {scale} scale, {seeds} seed{'' if seeds == '1' else 's'}"
    ours, path = panels_of(table, "mean"), folder / f"{figure.name}.png"
    paper = panels_of(table, "paper") if scale in figure.compared and figure.paper else {}
    if figure.curves:
        plot_score_curves(ours, panels_of(table, "std"), paper, path, title)
        return [path]
    plot_score_grid(ours, path, title)
    paths = [path]
    if paper:
        paths.append(folder / f"{figure.name}_beside_paper.png")
        notes = panels_of(table.assign(note=table.note.str.removeprefix("paper: ")), "note")
        plot_side_by_side(ours, paper, panels_of(table, "difference"), notes, printed_decimals(table), paths[-1], title)
    if "theory" in table:
        paths.append(folder / f"{figure.name}_beside_theory.png")
        cells = table[table.semantics == "dependent"].assign(note="")
        cells["difference"] = cells["mean"] - cells.theory
        panels = (panels_of(cells, name) for name in ("mean", "theory", "difference", "note"))
        plot_side_by_side(*panels, 2, paths[-1], title, "theory")
    return paths


# Whatever is text is escaped where it enters the page.
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; color: #222 }
.first { font-size: 1.15rem; font-weight: 600; margin: .2rem 0 } img { max-width: 100% }
table { border-collapse: collapse; margin: .8rem 0; font-size: 12px } caption { text-align: left; font-weight: 600 }
th, td { border: 1px solid #ddd; padding: .25rem .45rem; text-align: right } th { background: #f4f4f4 }
.text td { text-align: left } small { color: #555 } summary { cursor: pointer }
.close { background: #e3f3e3 } .near { background: #fff3cf } .far { background: #fbd9d5 } .misprint { background: #eee }
.scale { border-top: 3px solid #888; margin-top: 2.5rem }
"""


def cell_text(row, decimals):
    """HTML of one cell: mean ± std, and the paper's number with its decimals and the difference."""
    text = "–" if not row.seeds else f"<b>{row['mean']:z.2f}</b>" + (f" ± {row['std']:.2f}" if row.seeds > 1 else "")
    if row.get("note"):
        return f"{text}<br><small>{html.escape(row.note)}</small>"
    if not math.isnan(row.get("paper", math.nan)):
        difference = f" ({row.difference:+z.2f})" if row.seeds else ""
        text += f"<br><small>paper {row.paper:z.{decimals}f}{difference}</small>"
    if row.seeds and not math.isnan(row.get("theory", math.nan)):
        text += f"<br><small>theory {row.theory:.2f}</small>"
    return text


def table_html(table, kind="", **formats):
    """HTML of a DataFrame without its index, its texts escaped; kind: its class in STYLE."""
    styler = table.style.hide().format(escape="html", **formats).format_index(escape="html", axis=1)
    return styler.set_table_attributes(f'class="{kind}"').to_html()


def figure_tables(table):
    """HTML of a figure's numbers, a table for each panel; the colours tell how near the paper they are."""
    compared, parts = "paper" in table, []
    text = table.apply(cell_text, axis=1, decimals=printed_decimals(table) if compared else 0)
    if compared:
        nearness = pd.cut(distances(table), (-1, CLOSE, NEAR, math.inf), labels=("close", "near", "far")).astype(object)
        classes = panels_of(table.assign(nearness=nearness.where(table.note == "", "misprint")), "nearness")
    for panel, texts in panels_of(table.assign(text=text), "text").items():
        styler = texts.rename_axis(index=None, columns=None).style.format_index(escape="html")
        styler = styler.format_index(escape="html", axis=1).set_caption(html.escape(f"{panel[1]}, {panel[0]}"))
        parts.append((styler.set_td_classes(classes[panel]) if compared else styler).to_html())
    return "\n".join(parts)


def pattern(tables, scale):
    """HTML about the pattern of the theory: for each experiment how many cells are so, and the rest with their runs."""
    should = f"at least {LEARNED} for an unbiased factor and at most {ABSENT} for any other"
    parts = [f"<h2>Pattern of the theory, {scale} scale</h2><p>Independent factors, nonlinear scores: {should}.</p>"]
    for experiment in dict.fromkeys(figure.experiment for figure in tables):
        cells = foretold([table for figure, table in tables.items() if figure.experiment == experiment])
        if cells.empty:
            continue
        broken = cells[~cells.holds]
        held = f"{cells.holds.sum()} of {len(cells)} cells ({cells.holds.mean():.1%}) are so."
        parts.append(f"<p>{html.escape(experiment)}: {held}{' The rest, with their runs:' if len(broken) else ''}</p>")
        if len(broken):
            shown = pd.DataFrame({
                "setting, encoding, factor": broken.source,
                "expected": broken.learned.map({True: f"≥ {LEARNED}", False: f"≤ {ABSENT}"}),
                "mean": broken["mean"],
                "runs": [", ".join(f"{run} {value:.2f}" for run, value in runs.items()) for runs in broken.runs],
            })  # fmt: skip
            parts.append(table_html(shown, "text", precision=3))
    return "\n".join(parts) if parts[1:] else ""


def scale_section(scale, tables, summary, pictures):
    """HTML of one scale: summary, pattern of the theory, and each figure with its numbers."""
    shown = table_html(summary.rename(columns=lambda name: name.replace("_", " ")), na_rep="–")
    parts = [f'<section class="scale"><h1>{scale} scale: {html.escape(SCALES[scale])}</h1>', shown]
    total = counts(summary)
    if compared := total.get("independent_compared"):
        nearer, near = (total[f"independent_within_{bound}"] for bound in (CLOSE, NEAR))
        closest = f"{nearer} of {compared} cells ({nearer / compared:.1%}) lie within ±{CLOSE} of the paper"
        parts.append(f"<p>Independent semantics: {closest}, {near} ({near / compared:.1%}) within ±{NEAR}.</p>")
    parts.append(pattern(tables, scale))
    for figure, paths in pictures.items():
        colours = f"; green: within ±{CLOSE} of the paper, yellow: within ±{NEAR}, red: further" * (scale in figure.compared)
        name = html.escape(figure.name)
        parts.append(f"<h2>{name}: {html.escape(figure.titled(scale))} ({scale} scale)</h2>")
        for path in paths:
            alt, image = html.escape(f"{path.stem}, {scale} scale"), base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{image}"></p>')
        heading = f"{name}, {scale} scale: every number (mean ± standard deviation over seeds{colours})"
        parts.append(f"<details><summary>{heading}</summary>{figure_tables(tables[figure])}</details>")
    return "\n".join([*parts, "</section>"])


def write_report(args):
    """`report`: write tables, pictures and index.html; InputError if there are no models, or, in the end, if one is damaged."""
    figures = chosen_figures(args.names or ["all"])
    output, sections, lines, damaged = Path(args.output), [], [], {}
    results = functools.cache(functools.partial(read_results, args.models, damaged))
    for scale in [args.scale] if args.scale else SCALES:
        tables = {figure: measured(figure, scale, results) for figure in figures}
        if not any(table.seeds.any() for table in tables.values()):
            continue
        folder = output / scale
        folder.mkdir(parents=True, exist_ok=True)
        summary = summarise(tables, scale)
        lines.append(f"{scale} scale: {counts_in_words(summary, scale)}.")
        write_csv(summary, folder / "summary.csv")
        write_csv(durations(figures, scale, results), folder / "models.csv")
        pictures, located = {}, set()
        for figure, table in tables.items():
            if table.seeds.any():
                write_csv(table.drop(columns=HIDDEN).round(4), folder / f"{figure.name}.csv")
                pictures[figure] = draw(figure, table, scale, folder) + write_geometry(figure, scale, results, folder, located)
        sections.append(scale_section(scale, tables, summary, pictures))
    if not lines and not damaged:
        names = ", ".join(figure.name for figure in figures)
        raise InputError(f"no finished model of {names} lies under {args.models}/; `python reproduce.py run` trains them")
    if lines:
        told = [*lines, *(f"Left out: {message}" for message in damaged)]
        head = f'<meta charset="utf-8"><title>Negate or Embrace: reproduction</title><style>{STYLE}</style>'
        body = "\n".join([*(f'<p class="first">{html.escape(line)}</p>' for line in told), *sections])
        page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
        write_bytes(output / "index.html", page.encode())
        print(*lines, f"report: {output / 'index.html'}", sep="\n")
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise InputError(f"{next(iter(damaged))}{more}: left out of the report")
    return 0

"""Ask captions what a contrastive model will learn from them: which annotated factors they tell, misstate and leave out.

    python audit_captions.py --factors factors.csv --captions captions.txt

factors.csv has a row an image and a column a factor, of words or numbers; captions.txt a caption a line, or blocks that empty
lines part, in the same order; a table (.csv, .tsv) may hold the captions too, in its column `caption`. Prints a table and one
sentence, writes OUTPUT.csv and OUTPUT.png.

A factor whose values are words is looked for by these words: a caption states the value that it names, and contradicts the
annotation where that is another one. Where values are numbers, the words that stand for them are found: each word belongs to
the factor that it has most to do with, and means the value that it occurs with most. By the theory, an encoder learns the
factors that captions tell, and neither those that they misstate nor those that they leave out; of these it can only hold what
depends on the told ones, whose score stands beside the captions' own. Paraphrases, and factors that nobody has annotated, are
not seen; nor is what a number's words mean where captions state it at random, or name several numbers by the same words: words
for the values, such as the names of colours, serve better.
"""

import collections
import csv
import functools
import io
import itertools
import re
import sys
from pathlib import Path

from running.command_line import InputError, Parser, integer, run_script

# isort: split

import numpy as np
import pandas as pd
import torch
from scipy.stats import chi2
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

import probes
from running.files import regular_file, write_csv
from running.memory import limit_memory
from running.pictures import check_picture, save_figure, subplots

WORD = r"\w+"  # of captions and of values: "coffee-cup" is two
CLASSES = 20  # numbers with more distinct values are measurements, and words with more share the class "others"
FEATURES = 100  # words and pairs of words that predict a factor, those that have most to do with it
MOST_COLUMNS = 10_000
FITTED, TESTED = 6_000, 6_000  # rows of the probes at most
LEAST = 20  # rows of which a share is told
CHANCE = 1e-9  # that a word has to do with a factor by accident
TOLD, WRONG = 0.01, 0.02  # lowest share of captions that speak of a factor; share of contradictions that is no slip
BLURRED = 0.05  # score of what is not told, from what is told, that is no accident


def main(argv=None):
    """Audit the captions; returns the exit code."""
    parser = Parser(__doc__)
    flag = parser.flag
    flag(
        "--factors", Path, "table of the annotated factors, a row an image: .csv, or parted by tabs or semicolons", required=True
    )
    flag("--captions", Path, "text file of the captions, or a table with the column caption", required=True)
    flag("--columns", str, "factors to look for; none given: all columns but those that number the rows", nargs="+")
    flag("--output", Path, "the table and the picture are OUTPUT.csv and OUTPUT.png", Path("audit"))
    flag("--seed", integer(0), "of the rows that probes are fitted and tested on", 0)
    args, _ = parser.parse(argv)
    limit_memory()
    picture, table = (args.output.with_name(f"{args.output.name}.{suffix}") for suffix in ("png", "csv"))
    check_picture(picture)
    factors = read_factors(args.factors, args.columns)
    captions = read_captions(args.captions, len(factors))
    if len(captions) != len(factors):
        raise InputError(
            f"{args.captions} has {len(captions):,} captions and {args.factors} {len(factors):,} rows, expected as many; a "
            "caption is a line, or several with an empty line between two captions"
        )
    if len(factors) < 10 * LEAST:
        raise InputError(f"{args.factors} has {len(factors)} rows, expected at least {10 * LEAST}: rates of fewer say nothing")
    report = audit(factors, captions, args.seed)
    print(report.to_string(index=False, na_rep="–", float_format="{:.3f}".format))
    print(conclusion(report))
    write_csv(report, table)
    draw(report, picture)
    print(f"table        {table}\npicture      {picture}")
    return 0


# --------------------------------------------------------------------------------------------------------------
# the two files


def decoded(path):
    """Text of a file in UTF-8 or UTF-16 with a mark, else in Windows-1252, which a line says; InputError if there is none."""
    try:
        content = regular_file(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    for encoding in ["utf-16"] if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ["utf-8-sig", "cp1252"]:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            if encoding == "cp1252":
                print(f"{path} is not UTF-8 and is read as Windows-1252", file=sys.stderr)
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(f"{path} is no text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8")


def read_table(path):
    """DataFrame of texts of a table parted by commas, semicolons or tabs, whichever its header has most of; "" where a gap is."""
    text = decoded(path)
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    if header.count(separator) >= MOST_COLUMNS:
        raise InputError(f"{path} has {header.count(separator) + 1:,} columns, expected {MOST_COLUMNS:,} at most: a factor each")
    csv.field_size_limit(sys.maxsize)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True) if row]
    except csv.Error as error:
        raise InputError(f"{path} is no table ({error}); write it as CSV") from None
    if len(rows) < 2:
        raise InputError(f"{path} has no rows, expected a header and a row an image")
    names = [name.strip() for name in rows[0]]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(f"{path} has two columns {twice[0]!r}; rename one")
    if wrong := next((number for number, row in enumerate(rows, 1) if len(row) > len(names)), None):
        raise InputError(f"{path}, row {wrong} has more values than there are columns; mend the row")
    return pd.DataFrame([[*map(str.strip, row), *[""] * (len(names) - len(row))] for row in rows[1:]], columns=names)


def read_factors(path, columns=None):
    """DataFrame of the factors, a row an image: columns of numbers are float64 with NaN in gaps, others texts with None."""
    table = read_table(path)
    if missing := [name for name in columns or () if name not in table]:
        raise InputError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, table))}")
    factors = {}
    for name in columns or table:
        cells = table[name].where(~table[name].str.lower().isin(["", "na", "n/a", "nan", "none", "null", "?"]))
        numbers = pd.to_numeric(cells, errors="coerce")
        is_numeric = numbers.notna().sum() == cells.notna().sum()
        values = numbers.astype(float) if is_numeric else cells
        present = values.dropna()
        if present.empty:
            if columns:
                raise InputError(f"{path}: {name} has no values, expected numbers or words")
            continue
        if is_numeric and np.isinf(present).any():
            raise InputError(f"{path}: {name} has infinite values, expected numbers or words")
        # 1, 2, 3 …, or the names of files
        is_label = (
            len(present) > 2 and (np.diff(present) == 1).all() if is_numeric else len(present) > LEAST and present.is_unique
        )
        if columns or not (name in ("", "caption") or is_label):
            factors[name] = values
    if not factors:
        raise InputError(f"{path} has no column of factors: each is empty, or numbers or names the rows")
    return pd.DataFrame(factors)


def read_captions(path, count):
    """List of captions: a table's column caption, else lines, or blocks that empty lines part if only these are `count`."""
    if path.suffix.lower() in (".csv", ".tsv"):
        table = read_table(path)
        if "caption" not in table:
            raise InputError(f"{path} has no column 'caption'; it has {', '.join(map(repr, table))}")
        return list(table["caption"])
    text = decoded(path)
    lines = text.removesuffix("\n").split("\n")
    if len(lines) == count:
        return lines
    blocks = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
    return blocks if len(blocks) == count else lines


# --------------------------------------------------------------------------------------------------------------
# what captions state


def words_of(text):
    """List of the words of a text, in lower case."""
    return re.findall(WORD, text.lower())


def named_values(captions, factors):
    """Dict factor → list of what each of N captions names of it, None for nothing.

    captions: N lists of words; factors: DataFrame of words. The longest name wins where several begin. A name that several
    factors have is that of the factor whose other names stand in like places: between the same words.
    """
    names = collections.defaultdict(list)  # words → [(factor, value)]
    for factor in factors:
        for value in factors[factor].dropna().unique():
            if phrase := tuple(words_of(value)):
                names[phrase].append((factor, value))
    lengths = collections.defaultdict(set)
    for phrase in names:
        lengths[phrase[0]].add(len(phrase))
    found = []  # of each caption: [(owners, word before, word after)]
    for words in captions:
        places, at = [], 0
        while at < len(words):
            for length in sorted(lengths.get(words[at], ()), reverse=True):
                if owners := names.get(tuple(words[at : at + length])):
                    before, after = words[at - 1] if at else "", words[at + length] if at + length < len(words) else ""
                    places.append((owners, before, after))
                    at += length - 1
                    break
            at += 1
        found.append(places)
    contexts = {factor: (collections.Counter(), collections.Counter()) for factor in factors}
    for places in found:
        for owners, *around in places:
            if len(owners) == 1:
                for counter, word in zip(contexts[owners[0][0]], around, strict=True):
                    counter[word] += 1
    totals = {factor: sum(before.values()) for factor, (before, _) in contexts.items()}

    @functools.cache
    def likelihood(factor, before, after):
        (befores, afters), total = contexts[factor], totals[factor]
        return (befores[before] + 0.01) * (afters[after] + 0.01) / (total + 1)

    stated = {factor: [None] * len(captions) for factor in factors}
    for row, places in enumerate(found):
        best = {}  # of two values of one factor the one in the likelier place: part of another name may look like a value
        for owners, *around in places:
            rated = [(likelihood(factor, *around), factor, value) for factor, value in owners]
            likely, factor, value = max(rated)
            if likely > best.get(factor, -1):
                best[factor], stated[factor][row] = likely, value
    return stated


def in_classes(values):
    """(N,) int64 classes of a column, −1 in gaps: few distinct values each are one, more numbers are parted by quantiles."""
    present, classes = values.notna().to_numpy(), np.full(len(values), -1)
    distinct = values[present].value_counts()
    if values.dtype == float and len(distinct) > CLASSES:
        edges = np.unique(np.quantile(values[present], np.linspace(0, 1, CLASSES + 1)[1:-1]))
        classes[present] = np.searchsorted(edges, values[present], side="right")
    else:
        kept = {value: number for number, value in enumerate(distinct.index[:CLASSES])}
        classes[present] = values[present].map(lambda value: kept.get(value, CLASSES))
    return classes


def associations(features, classes):
    """(chi-square (V,), information in nats (V,), degrees of freedom) between (N, V) sparse binary features and (N,) classes."""
    rows = np.flatnonzero(classes >= 0)
    labels, place = np.unique(classes[rows], return_inverse=True)
    hot = np.zeros((len(rows), len(labels)))
    hot[np.arange(len(rows)), place] = 1
    with_word, in_class = np.asarray(features[rows].T @ hot), hot.sum(axis=0)
    share = with_word.sum(axis=1, keepdims=True) / len(rows)
    statistic, information = 0.0, 0.0
    for observed, expected in ((with_word, share * in_class), (in_class - with_word, (1 - share) * in_class)):
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = statistic + np.nan_to_num((observed - expected) ** 2 / expected).sum(axis=1)
            information = information + np.nan_to_num(observed * np.log(observed / expected)).sum(axis=1)
    return statistic, information / len(rows), len(labels) - 1


def meant_values(words, classes, factors):
    """Dict factor → (N,) class that a caption's words mean, −1 without such words; factors: names of columns of numbers.

    words: (N, V) sparse, by columns; classes: dict factor → (N,) of all factors. A word belongs to the factor that it has
    most information about, as it depends on all others through that one; it means the class that it raises most.
    """
    tests = {factor: associations(words, column) for factor, column in classes.items()}
    most = np.argmax([information for _, information, _ in tests.values()], axis=0)
    meant = {}
    for number, (factor, (statistic, _, freedom)) in enumerate(tests.items()):
        if factor not in factors or not freedom:
            continue
        own = np.flatnonzero((most == number) & (chi2.sf(statistic, freedom) < CHANCE))
        meant[factor] = np.full(words.shape[0], -1)
        known, strongest = classes[factor] >= 0, np.zeros(words.shape[0])
        frequency = np.bincount(classes[factor][known])
        for word in own:
            rows = words[:, [word]].nonzero()[0]
            counts = np.bincount(classes[factor][rows][known[rows]], minlength=len(frequency))
            lift = counts / np.maximum(frequency, 1) / max(counts.sum(), 1) * known.sum()
            taken = rows[lift.max() > strongest[rows]]
            meant[factor][taken], strongest[taken] = lift.argmax(), lift.max()
    return meant


# --------------------------------------------------------------------------------------------------------------
# the audit


def audit(factors, captions, seed=0):
    """DataFrame with a row a factor: what captions say of it and what an encoder trained on them will hold.

    factors: DataFrame of N rows, as `read_factors` has it; captions: N texts. Columns: factor, values (words, classes, numbers),
    rows annotated, share of captions that speak of it, share of those that contradict the annotation, with the limits of its 95 %
    interval (Wilson, 1927), the score, held out, with which captions predict it (MCC of classes, R² of numbers), the score with
    which the told factors do, and the verdict: told, misstated or left out.
    """
    cut = [words_of(caption) for caption in tqdm(captions, "words", disable=None, leave=False)]
    in_numbers = [name for name in factors if factors[name].dtype == float]
    # "Red" is "red": values are what captions are compared by, their words
    in_words = factors.drop(columns=in_numbers).map(lambda value: " ".join(words_of(value)), na_action="ignore")
    factors = factors.copy()
    factors[in_words.columns] = in_words
    classes = {name: in_classes(factors[name]) for name in factors}
    vectoriser = CountVectorizer(
        analyzer=lambda words: words + [" ".join(pair) for pair in itertools.pairwise(words)],
        binary=True, min_df=max(2, len(captions) // 5_000), dtype=np.float32,
    )  # fmt: skip
    try:
        features = vectoriser.fit_transform(cut).tocsr()
    except ValueError:  # no word that occurs twice
        features = None
    stated = named_values(cut, in_words)
    if features is not None:
        single = np.flatnonzero([" " not in name for name in vectoriser.get_feature_names_out()])
        meant = meant_values(features[:, single].tocsc(), classes, in_numbers)
    rows = []
    for name in tqdm(factors, "factors", disable=None, leave=False):
        known = factors[name].notna().to_numpy()
        if name in in_words:
            says = np.array([value is not None for value in stated[name]])
            wrong = np.array(stated[name], dtype=object) != factors[name].to_numpy()
        else:
            says = np.zeros(len(known), bool) if features is None or name not in meant else meant[name] >= 0
            wrong = meant[name] != classes[name] if says.any() else says
            if len(np.unique(classes[name])) > CLASSES // 2:  # neighbours: a word's meaning ends within one of its classes
                wrong = far_off(factors[name].to_numpy(), meant[name] if says.any() else says, says, classes[name])
        known_says = says & known
        share, count = known_says.sum() / max(known.sum(), 1), int(known_says.sum())
        row = {"factor": name, "values": "words" if name in in_words else "classes", "rows": int(known.sum()), "says": share}
        if is_measure(factors[name]):
            row["values"] = "numbers"
        rate, low, high = interval(int((wrong & known_says).sum()), count) if share >= TOLD and count >= LEAST else 3 * [np.nan]
        row |= {"contradicts": rate, "low": low, "high": high}
        row["from_captions"] = 0.0 if features is None else score(features, factors[name], classes[name], seed)
        verdict = "left out" if np.isnan(rate) else "misstated" if low > WRONG else "told"
        rows.append(row | {"verdict": verdict})
    told = [row["factor"] for row in rows if row["verdict"] == "told"]
    hot = [np.eye(CLASSES + 1, dtype=np.float32)[classes[name]] * (classes[name] >= 0)[:, None] for name in told]
    for row in rows:
        others = [table for name, table in zip(told, hot, strict=True) if name != row["factor"]]
        name = row["factor"]
        row["from_told"] = score(np.concatenate(others, axis=1), factors[name], classes[name], seed) if others else 0.0
    last = ["from_told", "verdict"]
    return pd.DataFrame(rows)[[*(key for key in rows[0] if key not in last), *last]]


def is_measure(values):
    """Whether a column holds numbers that are not a few classes."""
    return values.dtype == float and values.nunique() > CLASSES


def far_off(values, meant, says, classes):
    """(N,) whether a measured value lies outside of what its caption's words stand for: the values in and around their class.

    The words that mean one class are taken together; they stand for the classes that they raise by more than a quarter of that.
    """
    wrong, known = np.zeros(len(values), bool), classes >= 0
    frequency = np.bincount(classes[known])
    for meaning in np.unique(meant[says]):
        rows = np.flatnonzero(says & known & (meant == meaning))
        lift = np.bincount(classes[rows], minlength=len(frequency)) / np.maximum(frequency, 1)
        background = np.median(lift)
        near = np.convolve(lift - background > (lift.max() - background) / 4, np.ones(3), "same") > 0
        wrong[rows] = ~near[classes[rows]]
    return wrong


def interval(count, total, z=1.96):
    """(share, lower, upper limit) of `count` of `total`, by Wilson's score interval."""
    share = count / total
    middle, width = share + z * z / (2 * total), z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [share, max((middle - width) / (1 + z * z / total), 0.0), min((middle + width) / (1 + z * z / total), 1.0)]


def score(features, values, classes, seed):
    """Held-out score with which linear probes predict a factor, at least 0: R² of measured numbers, MCC of classes.

    features: (N, V), sparse or not, of which those that have most to do with the factor on the fitted rows are used.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(classes >= 0))
    fit_count = min(FITTED, len(rows) * 3 // 5)
    fit, test = rows[:fit_count], rows[fit_count : fit_count + TESTED]
    if len(test) < 2 or len(np.unique(classes[fit])) < 2:
        return 0.0
    statistic = associations(features[fit], classes[fit])[0]
    best = np.sort(np.argsort(statistic, kind="stable")[-FEATURES:])
    h = [features[part][:, best] for part in (fit, test)]
    h = [torch.from_numpy(np.asarray(part.todense() if hasattr(part, "todense") else part)).float() for part in h]
    if is_measure(values):
        targets = [{"": torch.from_numpy(values.to_numpy()[part])} for part in (fit, test)]
        return max(probes.linear_r2(h[0], targets[0], h[1], targets[1])[""], 0.0)
    targets = [{"": torch.from_numpy(classes[part])} for part in (fit, test)]
    return max(probes.logistic_mcc(h[0], targets[0], h[1], targets[1])[""], 0.0)


def conclusion(report):
    """The audit in a sentence or three."""
    by_verdict = {verdict: report[report.verdict == verdict] for verdict in ("told", "misstated", "left out")}
    told = ", ".join(by_verdict["told"].factor) or "nothing"
    text = f"A contrastive model will learn {told}"
    excluded = []
    if len(wrong := by_verdict["misstated"]):
        shown = (f"{row.factor} (misstated in {row.contradicts:.0%})" for row in wrong.itertuples())
        excluded.append(", ".join(shown))
    if len(absent := by_verdict["left out"]):
        excluded.append(", ".join(f"{name} (left out)" for name in absent.factor))
    text += f", and not {', '.join(excluded)}." if excluded else ": captions tell every factor."
    blurred = report[(report.verdict != "told") & (report.from_told > BLURRED)]
    if len(blurred):
        text += " Through the factors it learns it will still hold something of "
        text += ", ".join(f"{row.factor} ({row.from_told:.2f})" for row in blurred.itertuples()) + "."
    partly = report[(report.verdict == "told") & (report.says < 0.99)]
    if len(partly):
        text += " Told in part only: " + ", ".join(f"{row.factor} ({row.says:.0%})" for row in partly.itertuples()) + "."
    return text


def draw(report, path):
    """Write a picture: of each factor the share of captions that speak of it, of contradictions, and both scores."""
    figure, grid = subplots(1, 2, 4.6 * 2, 1.2 + 0.36 * len(report))
    places = np.arange(len(report))
    colours = report.verdict.map({"told": "tab:blue", "misstated": "tab:orange", "left out": "lightgray"})
    left, right = grid[0]
    left.barh(places, report.says, color=colours, height=0.7)
    errors = np.nan_to_num([report.contradicts - report.low, report.high - report.contradicts]).clip(min=0)
    style = {"fmt": "o", "color": "black", "markersize": 4, "clip_on": False, "label": "contradict the annotation"}
    left.errorbar(report.contradicts, places, xerr=errors, **style)
    left.set(yticks=places, yticklabels=[f"{row.factor}: {row.verdict}" for row in report.itertuples()],
             title="captions that speak of it", xlim=(0, 1.02))  # fmt: skip
    right.barh(places, report.from_captions, color=colours, height=0.7)
    right.plot(report.from_told, places, "|", color="black", markersize=10, markeredgewidth=2, label="from the told factors")
    right.set(yticks=places, yticklabels=[], title="predicted from captions, MCC or R²", xlim=(0, 1.02))
    for axes in grid[0]:
        axes.invert_yaxis()
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)

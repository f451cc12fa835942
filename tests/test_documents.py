"""The pages of this repository: every link leads somewhere, and every command can be typed as it stands."""

import contextlib
import functools
import io
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest
import torch.distributed.run as torchrun

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "RESULTS.md"
PAGES = [README, RESULTS, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md", ROOT / "paper/README.md"]
SCRIPTS = [
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "rendering_data/*/*.py", "benchmarks/*.py", "torture/*.py")
    for file in sorted(ROOT.glob(pattern))
    if '__name__ == "__main__"' in file.read_text()
]
PROGRAMS = (
    "python",
    "make",
    "blender",
    "taskset",
    "cp",
    "mkdir",
    "squeue",
    "torchrun",
)  # that a page may use, beside the shell's own
TRAINING = {"numeric": "main_numeric.py", "mpi3d": "main_mpi3dreal.py", "causal3dident": "main_causal3dident.py"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
# Writes down how it was called. The first two words of taskset say which cores; what follows is the command.
STAND_IN = """#!{shell}
[ "${{0##*/}}" = taskset ] && shift 2 && exec "$@"
printf '%s\\0' "$0" "$@" $'\\x1e' >>"$CALLS"
"""


def blocks(page, language="sh"):
    """Contents of a page's fenced blocks in a language."""
    return [content for kind, content in FENCED.findall(page.read_text()) if kind == language]


def inline_code(page):
    """Pieces of code in a page's running text and tables."""
    return [" ".join(piece.split()) for piece in INLINE.findall(FENCED.sub("", page.read_text()))]


# --------------------------------------------------------------------------------------------------------------
# links


def anchors(page):
    """Set of the names that GitHub gives a page's headings."""
    names, seen = set(), {}
    for heading in re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen.get(name) else name)
        seen[name] = seen.get(name, 0) + 1
    return names


def broken_links(page):
    """One line for each link or picture of a page that leads nowhere; links out are checked for their form alone."""
    text = INLINE.sub("", FENCED.sub("", page.read_text()))
    targets = re.findall(r"\]\(([^)]*)\)|^\[[^\]]+\]:(.*)$|(?:src|href)=\"([^\"]*)\"", text, re.MULTILINE)
    faults = []
    for target in (next(filter(None, groups), "").strip() for groups in targets):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme not in ("http", "https") or "." not in url.netloc or re.search(r"\s", target):
                faults.append(f"{target}: no address")
            continue
        file = (page.parent / unquote(url.path)).resolve() if url.path else page
        if not target or not file.exists():
            faults.append(f"{target}: no such file")
        elif url.fragment and (file.suffix != ".md" or url.fragment not in anchors(file)):
            faults.append(f"{target}: no such heading")
    return faults


# --------------------------------------------------------------------------------------------------------------
# commands


@pytest.fixture(scope="session")
def shell(tmp_path_factory):
    """shell(code) → (calls, complaints): the programs that a piece of shell calls, each a list of words, and its stderr.

    A real shell runs the code, with all its loops and variables, where every program is a stand-in that does nothing.
    """
    folder, bash = tmp_path_factory.mktemp("shell"), shutil.which("bash")
    repository, log = folder / "repository", folder / "calls"
    places = [
        *(folder / "bin" / name for name in PROGRAMS),
        repository / ".venv/bin/python",
        repository / ".venv-blender/bin/python",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(STAND_IN.format(shell=bash))
        place.chmod(0o755)
    (repository / ".venv/bin/activate").touch()
    for model in ("one", "another"):
        (repository / "models" / model).mkdir(parents=True)

    def run(code):
        log.write_text("")
        environment = {"PATH": str(folder / "bin"), "CALLS": str(log)}
        ended = subprocess.run([bash, "-u", "-c", code], cwd=repository, env=environment, capture_output=True, text=True)
        calls = [call.split("\0") for call in log.read_text().split("\0\x1e\0")[:-1]]
        return calls, ended.stderr.splitlines()

    return run


@functools.cache
def help_of(script, *words):
    """What `python SCRIPT WORDS --help` prints. It runs in this process, which has loaded torch already."""
    printed = io.StringIO()
    argv, path = [script, *words, "--help"], [str((ROOT / script).parent), *sys.path]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", path),
        mock.patch.dict(os.environ, COLUMNS="1000"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert printed.getvalue().startswith("usage: ")
    return printed.getvalue()


def flags_of(script, *words):
    """({flag: its operand as the usage shows it, "" for none}, set of the flags that must be given)."""
    usage = optional = help_of(script, *words).split("\n\n")[0]
    while "[" in optional:
        optional = re.sub(r"\[[^\[\]]*\]", "", optional)
    return dict(re.findall(r"(--[\w-]+)(?: (\{[^}]*\}|[A-Z_]+))?", usage)), set(re.findall(r"--[\w-]+", optional))


def wrong_flags(script, words):
    """One line for each fault of a script's command line: it, a flag, an operand or a figure's name is unknown, or missing."""
    if script not in SCRIPTS:
        return [f"{script}: no such script"]
    subcommand = words[:1] if script == "reproduce.py" else []
    known, required = flags_of(script, *subcommand)
    known["--help"] = ""
    if script == "benchmarks/time_to_identification.py":  # it hands on what it does not know
        experiment = words[words.index("--experiment") + 1] if "--experiment" in words else "numeric"
        known = flags_of(TRAINING[experiment])[0] | known
    faults = [f"{script} lacks {flag}" for flag in sorted(required - set(words))]
    names, operands = [], 0
    for word, following in itertools.pairwise([*words[len(subcommand) :], None]):
        if re.match(r"-\D", word):
            operand = known.get(word)
            operands = bool(operand)
            if operand is None:
                faults.append(f"{script} knows no {word}")
            elif operand and (not following or re.match(r"-\D", following)):
                faults.append(f"{script} {word} needs a value")
            elif operand.startswith("{") and following not in operand.strip("{}").split(","):
                faults.append(f"{script} {word} is none of {operand}, but {following}")
        elif operands:
            operands = False
        else:
            names.append(word)
    if subcommand:
        listed = re.search(r"\n  NAME +(.*?)\n\n", help_of(script, *subcommand), re.DOTALL)[1]
        faults += [f"{script} knows no figure {name}" for name in names if name not in re.findall(r"\w+", listed)]
    return faults


def wrong_call(program, *words):
    """One line for each fault of a command, its program and its words."""
    words = list(words)
    match Path(program).name:
        case "make":
            targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return [f"make knows no {word}" for word in words if "=" not in word and word not in targets]
        case "python" if words[:1] == ["-c"]:
            compile(words[1], "a page", "exec")
        case "python":
            return wrong_flags(words[0], words[1:])
        case "blender":
            return wrong_flags(words[words.index("--python") + 1], words[words.index("--") + 1 :])
        case "torchrun":
            options = torchrun.get_args_parser().parse_args(words)
            return wrong_flags(options.training_script, options.training_script_args)
        case "cp":
            sources = [word for word in words[:-1] if not word.startswith("-")]
            return [f"{source}: nothing to copy" for source in sources if not (ROOT / source).exists()]
    return []


def wrong_commands(page, shell):
    """One line for each fault of the commands in a page's sh blocks, in its running text and in its tables.

    A flag that stands in the text by itself must be one of any script's.
    """
    code = inline_code(page)
    fenced = FENCED.findall(page.read_text())
    kinds = {kind for kind, _ in fenced}
    faults = [f"nobody checks {kind!r} blocks" for kind in sorted(kinds - {"sh", "bibtex", ""})]
    faults += ["a block has no end" for _, content in fenced if "```" in content]
    faults += ["a piece of code has no end"] * (FENCED.sub("", page.read_text()).count("`") % 2)
    for piece in [*blocks(page), *(piece for piece in code if re.match(r"(\S*/)?(python|make|blender) ", piece))]:
        calls, complaints = shell(piece)
        faults += complaints
        faults += [f"nothing is called by {piece!r}"] if not calls else []
        faults += [fault for call in calls for fault in wrong_call(*call)]
    alone = {flag for piece in code for flag in re.findall(r"(?<!\S)--[\w-]+", piece)} - {"--help", "--python", "--background"}
    if alone:
        subcommands = [("reproduce.py", command) for command in ("list", "run", "report")]
        all_known = set().union(*(flags_of(*words)[0] for words in [*zip(SCRIPTS), *subcommands]))
        faults += [f"no script knows {flag}" for flag in sorted(alone - all_known)]
    return faults


# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_can_be_typed(page, shell):
    assert wrong_commands(page, shell) == []


SOUND = """# A page

## `Twice`: a heading

## `Twice`: a heading

[a file](there.md), [its heading](there.md#of-it), [here](#twice-a-heading-1), <img src="there.md">,
[out](https://example.org/x), `[no link](nowhere)`, `make demo`, `--resume`.

```
[no link](nowhere) and python no_command.py
```

```sh
source .venv/bin/activate
python -c "import torch; print(torch.__version__)"
export OMP_NUM_THREADS=1
for seed in 1 2; do   # a comment with a --flag
    python main_numeric.py --recipe fast --beta-value -1 --seed $seed \\
        --model-id "numeric_$seed"
done
PYTHON=python3.12 make demo && OMP_NUM_THREADS=1 taskset -c 0,1 python reproduce.py run fig3 table5 --scale tiny --dry-run
.venv-blender/bin/python rendering_data/Causal3DIdent/generate_images.py --output-folder data/x
blender --background --python rendering_data/Causal3DIdent/generate_images.py -- --output-folder data/x --device optix
python benchmarks/time_to_identification.py --experiment mpi3d --bias-id 4 --jobs 2
python rendering_data/MPI3D/render_standin_images.py --grid 4 4 2 3 3 20 20
torchrun --standalone --nproc_per_node=2 main_causal3dident.py --bias-type selections
```
"""


def planted(tmp_path, old, new):
    """The sound page with something in it replaced, beside the file that it links to."""
    assert old in SOUND
    (tmp_path / "there.md").write_text("# There\n\n## Of it\n")
    page = tmp_path / "page.md"
    page.write_text(SOUND.replace(old, new))
    return page


def test_a_sound_page_passes(tmp_path, shell):
    page = planted(tmp_path, "A page", "A page")
    assert broken_links(page) == [] and wrong_commands(page, shell) == []
    calls = [call for block in blocks(page) for call in shell(block)[0]]
    assert [call[-1] for call in calls if "main_numeric.py" in call] == ["numeric_1", "numeric_2"]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("(there.md)", "(gone.md)", "gone.md: no such file"),
        ("(there.md)", "()", ": no such file"),
        ('src="there.md"', 'src="gone.png"', "gone.png: no such file"),
        ("there.md#of-it", "there.md#of-them", "there.md#of-them: no such heading"),
        ("#twice-a-heading-1", "#twice-a-heading-2", "#twice-a-heading-2: no such heading"),
        ("https://example.org/x", "https:/example.org/x", "https:/example.org/x: no address"),
        ("https://example.org/x", "ftp://example.org", "ftp://example.org: no address"),
    ],
)
def test_a_broken_link_is_found(tmp_path, old, new, fault):
    assert broken_links(planted(tmp_path, old, new)) == [fault]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("main_numeric.py", "main_numerical.py", "main_numerical.py: no such script"),
        ("--recipe fast", "--recipes fast", "main_numeric.py knows no --recipes"),
        ("--recipe fast", "--recipe faster", "main_numeric.py --recipe is none of {paper,fast,wide}, but faster"),
        ("--seed $seed", "--seed", "main_numeric.py --seed needs a value"),
        ('"numeric_$seed"', '"numeric_$sede"', "sede: unbound variable"),
        ("done\n", "", "syntax error"),
        ("```sh", "```console", "nobody checks 'console' blocks"),
        ("\n```\n\n```sh", "\n\n```sh", "a block has no end"),
        ('"numeric_$seed"', '""  --recip x', "main_numeric.py knows no --recip"),
        ("run fig3", "run fig33", "reproduce.py knows no figure fig33"),
        ("--dry-run", "--output report", "reproduce.py knows no --output"),
        ("make demo &&", "make dmeo &&", "make knows no dmeo"),
        ("`make demo`", "`make dmeo`", "make knows no dmeo"),
        ("`--resume`", "`--resmue`", "no script knows --resmue"),
        ("`--resume`", "`python\nno_script.py`", "no_script.py: no such script"),
        ("`--resume`", "`--resume", "a piece of code has no end"),
        ("taskset", "tasksel", "tasksel: command not found"),
        (".venv-blender/bin", ".venv-bender/bin", "No such file"),
        ("images.py --output-folder data/x\n", "images.py\n", "generate_images.py lacks --output-folder"),
        ("--device optix", "--device metal", "generate_images.py --device is none of {cpu,cuda,optix}, but metal"),
        ("--bias-id 4", "--theta-value 4", "time_to_identification.py knows no --theta-value"),
        ("--grid", "--gird", "render_standin_images.py knows no --gird"),
        ("--bias-type sel", "--bias-kind sel", "main_causal3dident.py knows no --bias-kind"),
    ],
)
def test_a_wrong_command_is_found(tmp_path, shell, old, new, fault):
    faults = wrong_commands(planted(tmp_path, old, new), shell)
    assert any(fault in line for line in faults), faults


def test_the_readme_is_short_and_says_nothing_of_machines_and_days():
    assert len(README.read_bytes()) <= 11_500
    months = "January|February|March|April|May|June|July|August|September|October|November|December"
    assert not re.search(rf"\b(AMD|EPYC|Intel|Xeon)\b|\b({months}) 20\d\d|\b20\d\d-\d\d", README.read_text())


def test_every_folder_of_results_has_its_line():
    index = RESULTS.read_text().split("## The folders of results")[1]
    folders = [*(ROOT / "results").glob("*/"), *(ROOT / "results").glob("*/*/")]
    assert folders and [folder for folder in folders if f"({folder.relative_to(ROOT)})" not in index] == []


def test_the_citation_names_the_paper_and_its_authors():
    cited = (ROOT / "CITATION.cff").read_text()
    title = README.read_text().splitlines()[0].removeprefix("# ")
    assert cited.startswith("cff-version: 1.2.0\n") and f"\n  title: {title}\n" in cited
    people = re.findall(r"family-names: (.*)\n      given-names: (.*)\n(?:      name-particle: (.*)\n)?", cited)
    names = [" ".join(filter(None, (given, particle, family))) for family, given, particle in people]
    assert len(names) == 7 and [name for name in names if name not in " ".join(README.read_text().split())] == []

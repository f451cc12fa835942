"""Every dependency is imported somewhere, and every import is of a dependency that is declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}
TOOLS = {"ruff", "pytest-xdist"}  # run, not imported
BY_OTHERS = {"jinja2"}  # pandas' Styler imports it
BLENDER = {"bpy", "bmesh", "mathutils"}  # of an environment of its own


def imports(*patterns):
    """Set of the modules of others that the files of these patterns import, wherever in them."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    assert files
    own = {path.stem for path in ROOT.iterdir()} | {file.stem for file in files}
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found - own - BLENDER - sys.stdlib_module_names


CODE = ("*.py", "running/*.py", "reading/*.py", "grids/*.py", "rendering_data/**/*.py")


def requirements():
    """Dict name of a dependency → (version, what it is for) of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()[1:]
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9.]+) +# (.+)", line) for line in lines]
    assert all(found), "each line is a name, a version and what it is for"
    return {match[1]: (match[2], match[3]) for match in found}


def test_what_is_required_is_imported_and_what_is_imported_is_required():
    modules = {IMPORTED_AS.get(name, name) for name in requirements()}
    assert modules - TOOLS - BY_OTHERS == imports(*CODE, "tests/*.py", "benchmarks/*.py")


def test_the_package_needs_what_its_code_imports_in_versions_that_the_pinned_ones_satisfy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(entry.split(">=") for entry in project["dependencies"])
    assert {IMPORTED_AS.get(name, name) for name in bounds} - BY_OTHERS == imports(*CODE)
    for name, bound in bounds.items():
        pinned, lowest = (list(map(int, version.split("."))) for version in (requirements()[name][0], bound))
        assert pinned >= lowest, name


def test_make_takes_the_environment_that_is_named_and_no_start_file_of_a_shell(tmp_path):
    """Shells read the file $ENV when they start, and clusters set it."""
    (tmp_path / "there/bin").mkdir(parents=True)
    (tmp_path / "there/bin/python").touch()
    (tmp_path / "profile.sh").touch()

    def demo(env):
        own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a make around this one
        done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, env=own | env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    with_none = demo({"ENV": ""})
    assert ".venv/bin/python main_numeric.py" in with_none[1] and demo({"ENV": f"{tmp_path}/profile.sh"}) == with_none
    code, said = demo({"ENV": f"{tmp_path}/there"})
    assert code == 0 and f"{tmp_path}/there/bin/python main_numeric.py" in said and "install" not in said
    code, said = demo({"ENV": f"{tmp_path}"})
    assert code == 2 and f"ENV={tmp_path} holds no bin/python" in said

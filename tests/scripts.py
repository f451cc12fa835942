"""What tests of scripts and of the folders that they write and read share."""

import pytest

from running.command_line import run_script


def exit_code(main, *flags):
    """Exit code of a script's `main` with these flags, as a shell would see it."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main([str(flag) for flag in flags]))
    return stopped.value.code or 0


def outcome(capsys, main, *flags):
    """(exit code, stdout, stderr) of a script's `main` with these flags."""
    capsys.readouterr()
    return exit_code(main, *flags), *capsys.readouterr()


def contents(folder):
    """Dict path within the folder → bytes of every file in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(path, content):
    """Put another file in the place of a linked one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)

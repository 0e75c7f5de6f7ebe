"""Refused commands: one sentence, and no change of any file."""

from kdpipe.pipeline.main import DEMO

ESCAPE = "a\n\x1b[31mred\x07"
LONG = "x" * 5000


def tree(folder):
    """Return all files below a folder, with their content."""
    return {
        path.relative_to(folder): path.lstat().st_mode if path.is_symlink() or not path.is_file() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def require_refused(ended, what, on_stdout=False):
    """Check for one sentence, or typer's usage and one; nothing unprintable; exit status 1 or 2."""
    assert ended.exception is None or isinstance(ended.exception, SystemExit), (what, ended.exception)
    assert ended.exit_code in (1, 2), (what, ended.stdout, ended.stderr)
    errors = ended.stderr.removeprefix(f"kdpipe: {DEMO}\n")
    output, silent = (ended.stdout, errors) if on_stdout and ended.stdout else (errors, ended.stdout)
    assert silent == "", what
    assert "Traceback" not in output
    lines = output.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in lines), (what, output)
    if output.startswith(("Usage: ", "Error: ")):
        assert lines[-1].startswith("Error: "), (what, output)
        assert ended.exit_code == 2
    else:
        assert on_stdout or len(lines) == 1, (what, output)
        assert on_stdout or output.startswith("kdpipe: "), (what, output)
        assert len(output) < (len(LONG) + 200 if on_stdout else 1000), what

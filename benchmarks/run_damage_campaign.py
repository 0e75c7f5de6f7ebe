"""Flip single bits in the files of finished and stopped runs: no command may go on with the damage in silence.

    uv run python benchmarks/run_damage_campaign.py [--flips N] [--commands N] [--seed N] [--dir FOLDER]

A tiny recipe is run from teacher to INT8 artifacts: once to the end, once stopped while the pruned student is
fine-tuned, so that there are a checkpoint and a start file. Each flip is in a random file, at a random bit; the stores
have a campaign of their own, `damage_campaign.py`. Every flip is shown to `verify_run`. All that it does not notice,
and a sample of --commands of those that it does, are shown to the next command, `kdpipe run`, too. That must

- fail with a sentence that names the file,
- or warn of the file, which is set aside (run.json, a record that no step reads),
- or end with the very files of an undamaged run: what it does not read (logs and locks), or makes again (artifacts).

Prints a Markdown table; exits with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.kdpipe_process import RECIPE, kdpipe_here

from kdpipe.pipeline.commands.verify import verify_run
from kdpipe.stages.training import checkpoint

STORES = {"store.zarr", "store.test.zarr"}
VARYING = {"events.jsonl", "run.json", "SHA256SUMS"}
"""Files that each command changes: logs, and the sums of these and of times."""

TIMED = {"result.json", "metrics.jsonl", "card.json", "README.md"}
"""Files with measured times, which differ where a job is done again."""


def make_runs(folder: Path) -> dict[str, Path]:
    """Make a stopped run and a finished one; the latter began as a copy of the former."""
    recipe, saves = folder / "tiny.toml", Counter[str]()
    recipe.write_text(RECIPE)

    def save(path: Path, *state: Any) -> None:
        checkpoint.save_checkpoint(path, *state)
        saves[path.parent.name] += 1
        if saves["pruned-seed0"] == 9:
            raise KeyboardInterrupt

    with patch("kdpipe.stages.training.loop.save_checkpoint", save):
        command(folder, "stopped", wanted=130)
    shutil.copytree(folder / "stopped", folder / "finished")
    command(folder, "finished", wanted=0)
    return {name: folder / name for name in ("finished", "stopped")}


def command(folder: Path, run: str, wanted: int | None = None) -> tuple[int, str]:
    """Run `kdpipe run` in this process; return the exit status and stderr."""
    ended = kdpipe_here("run", folder / "tiny.toml", "--run", folder / run)
    if wanted is not None and ended.exit_code != wanted:
        raise RuntimeError(f"{run}: exit status {ended.exit_code}: {ended.stderr[-2000:]}")
    return ended.exit_code, ended.stderr


def files_of(run: Path) -> list[Path]:
    """Return the run's files, without those of its stores."""
    found = [path for path in sorted(run.rglob("*")) if path.is_file() and not STORES & set(path.parts)]
    return [path for path in found if path.stat().st_size]


def outcome(run: Path, name: str) -> dict[str, bytes]:
    """Return the files that must be those of an undamaged run."""
    ignored = VARYING | (TIMED if name == "stopped" else set())
    found = [path for path in files_of(run) if path.name not in ignored and not path.name.endswith(".lock")]
    if name == "stopped":
        found = [path for path in found if not path.name.startswith(("latency", "pareto"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def flip(path: Path, rng: random.Random) -> tuple[int, int]:
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return place, bit


def campaign(folder: Path, num_flips: int, num_commands: int, rng: random.Random) -> Counter[str]:
    runs = make_runs(folder)
    undamaged = {}
    for name in runs:
        shutil.copytree(runs[name], folder / "work")
        command(folder, "work", wanted=0)
        undamaged[name] = outcome(folder / "work", name)
        shutil.rmtree(folder / "work")
    sampled = set(rng.sample(range(num_flips), num_commands))
    count: Counter[str] = Counter()
    for number in range(num_flips):
        name = rng.choices(list(runs), (0.7, 0.3))[0]  # stopped runs have fewer files, and take longer to go on
        path = rng.choice(files_of(runs[name]))
        before = path.read_bytes()
        place, bit = flip(path, rng)
        is_noticed = verify_run(runs[name], with_stores=False).is_damaged
        count[f"{name} run: {'noticed' if is_noticed else 'not covered'} by verify"] += 1
        if number in sampled or not is_noticed:
            shutil.copytree(runs[name], folder / "work")
            result = answer(folder, name, path, undamaged[name])
            count[f"{name} run: `kdpipe run` {result}"] += 1
            if result == "SILENT":
                print(f"silent: bit {bit} of byte {place} of {path.relative_to(folder)}", file=sys.stderr)
            shutil.rmtree(folder / "work")
        path.write_bytes(before)
    return count


def answer(folder: Path, name: str, path: Path, undamaged: dict[str, bytes]) -> str:
    """Run the next command on a copy of a damaged run, and return what it did."""
    code, text = command(folder, "work")
    if code:
        is_named = path.name in text and "Traceback" not in text
        return "fails, and names the file" if is_named else "SILENT"
    if any("warning" in line and path.name in line for line in text.splitlines()):
        return "warns of the file"
    return "ends with the files of an undamaged run" if outcome(folder / "work", name) == undamaged else "SILENT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--commands", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        count = campaign(Path(folder), options.flips, options.commands, random.Random(options.seed))
    print("| result | flips |\n| --- | ---: |")
    for what, number in sorted(count.items()):
        print(f"| {what} | {number:,} |")
    return 1 if any("SILENT" in what for what in count) else 0


if __name__ == "__main__":
    sys.exit(main())

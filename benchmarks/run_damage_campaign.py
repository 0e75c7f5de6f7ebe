"""Flip single bits in the files of finished and stopped runs: no command may go on with the damage in silence.

    uv run python benchmarks/run_damage_campaign.py [--flips N] [--commands N] [--seed N] [--dir FOLDER]

A tiny recipe is run from teacher to INT8 artifacts: once to the end, once stopped while the pruned student is
fine-tuned, so that there are a checkpoint and a start file. Each flip is in a random file, at a random bit; the stores
have a campaign of their own, `damage_campaign.py`. `verify_run` must name the file, and of a sample of --commands flips
`kdpipe run` must, too: it fails with a sentence, or warns of run.json, a record that no step reads, or ends with the
very files of an undamaged run, such as artifacts that are written again. Files without a sum (logs, locks and plots)
are damaged all at once in the end: `kdpipe run` must leave the files of an undamaged run.

Prints a Markdown table; exits with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import os
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
from kdpipe.store.fs.checksums import SUMS

STORES = {"store.zarr", "store.test.zarr"}
VARYING = {"events.jsonl", "run.json", "SHA256SUMS"}
"""Files that each command changes: logs, and the sums of these and of times."""

TIMED = {"result.json", "metrics.jsonl", "card.json", "README.md"}
"""Files with measured times, which differ where a job is done again."""


def make_runs(folder: Path) -> dict[str, Path]:
    """Make a stopped run and a finished one; the latter began as a copy of the former."""
    os.environ["KDPIPE_WORKSPACE"] = "none"  # a damaged run makes its files again, and takes no other run's
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
    undamaged = {name: answer(folder, name) for name in runs}
    sampled = set(rng.sample(range(num_flips), num_commands))
    uncovered: dict[str, dict[Path, bytes]] = {name: {} for name in runs}
    count: Counter[str] = Counter()
    for number in range(num_flips):
        name = rng.choices(list(runs), (0.7, 0.3))[0]
        path = rng.choice(files_of(runs[name]))
        before = path.read_bytes()
        place, bit = flip(path, rng)
        if found := verify_run(runs[name], with_stores=False).damaged:
            is_named = path in {damage.path for damage in found} or path.name == SUMS
            count[f"{name} run: noticed by verify" if is_named else f"{name} run: SILENT"] += 1
            if number in sampled:
                code, text, left = answer(folder, name)
                result = judge(path, code, text, is_equal=left == undamaged[name][2])
                count[f"{name} run: `kdpipe run` {result}"] += 1
        else:
            print(f"{name}: no sum covers bit {bit} of byte {place} of {path.relative_to(folder)}", file=sys.stderr)
            count[f"{name} run: in a file without a sum"] += 1
            uncovered[name][path] = path.read_bytes()
        path.write_bytes(before)
    for name, damaged in uncovered.items():  # all at once
        for path, content in damaged.items():
            path.write_bytes(content)
        is_equal = answer(folder, name)[2] == undamaged[name][2]
        count[f"{name} run: `kdpipe run` with all files without a sum damaged: {'same' if is_equal else 'SILENT'}"] += 1
    return count


def answer(folder: Path, name: str) -> tuple[int, str, dict[str, bytes]]:
    """Run the next command on a copy of a run; return its exit status, what it says, and what it leaves."""
    shutil.copytree(folder / name, folder / "work")
    code, text = command(folder, "work")
    left = outcome(folder / "work", name)
    shutil.rmtree(folder / "work")
    return code, text, left


def judge(path: Path, code: int, text: str, *, is_equal: bool) -> str:
    """Return what the command did with a file whose damage verify notices."""
    if code and path.name in text and "Traceback" not in text:
        return "fails, and names the file"
    if any("warning" in line and path.name in line for line in text.splitlines()):
        return "warns of the file"
    return "ends with the files of an undamaged run" if not code and is_equal else "SILENT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--commands", type=int, default=24)
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

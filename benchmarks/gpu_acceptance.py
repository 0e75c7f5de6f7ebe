"""Accept a GPU machine: numbers, robustness and speed of every stage, in one command of at most eight minutes.

    uv run python benchmarks/gpu_acceptance.py [--out DIR] [--only CHECK ...] [--again CHECK ...] [--data DIR] [--toy]

Each check of `gpu_checks/` runs in a process of its own with a time limit, in the order of `CHECKS`: a crash or a hang
of one leaves the others. `DIR/acceptance.json` keeps what each measured, after each check; `DIR/acceptance.md` is the
table. Run again, the command continues with the checks that are not in it yet. `--data` is a folder with CIFAR-100 as
torchvision stores it, for the table of the published pair; without it that check is skipped. `--toy` takes the smallest
sizes, on a CPU or where only the course of the checks matters: its rates mean nothing.

Exit code 0 if every check ran and every limit is met, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHECKS = {
    "environment": ("machine", 20),
    "gpu_tests": ("machine", 75),
    "parity": ("numbers", 40),
    "given_teacher": ("numbers", 25),
    "losses": ("numbers", 40),
    "reproducible": ("robustness", 60),
    "memory": ("robustness", 40),
    "stage_one": ("speed", 60),
    "stage_two": ("speed", 60),
    "qat": ("numbers", 30),
    "photographs": ("speed", 30),
    "second_job": ("robustness", 30),
    "two_ranks": ("robustness", 40),
    "cifar100": ("published", 120),
}
"""The checks in order: the module of `gpu_checks` that has each, and the seconds after which it is ended."""

TOTAL_S = 480.0
"""Seconds after which no further check is started; the last one gets what is left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-acceptance"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--again", nargs="+", default=[], choices=list(CHECKS), metavar="CHECK")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-100")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes")
    parser.add_argument("--limit", type=float, default=TOTAL_S, help="seconds in all")
    parser.add_argument("--check", choices=list(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        run_check(options.check, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    found = run_all(options)
    sys.exit(0 if all(map(passed, found.values())) else 1)


def run_check(name: str, options: argparse.Namespace) -> None:
    """Run one check in this process, and print its rows as the last line."""
    from gpu_checks import Settings

    shutil.rmtree(options.out / "work" / name, ignore_errors=True)
    check = getattr(import_module(f"gpu_checks.{CHECKS[name][0]}"), name)
    rows = check(Settings(options.device, options.out.absolute(), toy=options.toy, data=options.data))
    print("\n" + json.dumps([vars(row) for row in rows]))


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run the checks that have no result yet; return the results of all."""
    path, started = options.out / "acceptance.json", time.monotonic()
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only or CHECKS:
        if name in found and name not in options.again:
            continue
        left = options.limit - (time.monotonic() - started)
        if left < 5:
            print(f"{name}: no time left; run the same command again to continue")
            break
        limit = left if options.toy else min(CHECKS[name][1], left)
        found[name] = run_apart(name, limit)
        print_check(name, found[name])
        found = {known: found[known] for known in CHECKS if known in found}
        path.write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "acceptance.md").write_text(markdown(found))
    return {name: found.get(name) for name in options.only or CHECKS}


def run_apart(name: str, limit_s: float) -> dict[str, Any]:
    """Run a check in a process of its own, which is killed with its children after `limit_s` seconds."""
    started = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--check", name]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        output += f"\nended after {limit_s:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    if process.returncode == 0:
        return {"rows": json.loads(output.splitlines()[-1]), "seconds": seconds}
    return {"rows": [], "seconds": seconds, "error": output.strip()[-2000:]}


def passed(result: dict[str, Any] | None) -> bool:
    return result is not None and "error" not in result and all(row["met"] is not False for row in result["rows"])


def print_check(name: str, result: dict[str, Any]) -> None:
    state = "ok" if passed(result) else "error" if "error" in result else "a limit is missed"
    print(f"{name}: {state}, {result['seconds']} s", flush=True)
    for row in result["rows"]:
        print("  " + " | ".join(cells(row)), flush=True)
    if "error" in result:
        print("  " + result["error"].replace("\n", "\n  "), flush=True)


def markdown(found: dict[str, Any]) -> str:
    """Return the results as one table."""
    lines = ["| check | what | measured | limit | met |", "|---|---|---|---|---|"]
    for name, result in found.items():
        lines += ["| " + " | ".join((name, *cells(row))) + " |" for row in result["rows"]]
        if "error" in result:
            last = result["error"].splitlines()[-1] if result["error"] else "it printed nothing"
            lines.append(f"| {name} | error | {last.replace('|', '/')[:200]} | | **no** |")
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    measured = f"{row['measured']:.4g}" if isinstance(row["measured"], float) else str(row["measured"])
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    return row["what"], measured.replace("|", "/"), row["limit"], met


if __name__ == "__main__":
    main()

"""Accept a GPU machine: numbers, robustness and speed of every stage, in one command of at most eight minutes.

    uv run python benchmarks/gpu_acceptance.py [--out DIR] [--only CHECK ...] [--again CHECK ...] [--data DIR] [--toy]

Each check of `gpu_checks/` runs in a process of its own with a time limit, in the order of `CHECKS`: a crash or a hang
of one leaves the others. Those that measure no speed run side by side, on half of the cores. After each check
`DIR/acceptance.json` keeps what all measured; `DIR/acceptance.md` is the table, and says what to do where a limit is
missed; `DIR/logs` has what each check printed. Run again, the command continues with the checks that are not in it yet
or were cut off. `--data` is a folder with CIFAR-100 as torchvision stores it, for the published pair: without it
that check is skipped. `--toy` takes the smallest sizes, on a CPU or where only the course of the checks matters: its
rates mean nothing. Nothing is downloaded.

Exit code 0 if every check ran and every limit is met, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["KDPIPE_WORKSPACE"] = "none"  # runs that are compared compute everything themselves

Result = dict[str, Any]
"""What is kept of a check: "rows", "seconds", and "error" or "cut_off" if it did not end."""


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        module: The module of `gpu_checks` that has it.
        limit_s: Seconds after which it is ended.
        advice: What to do where a limit is missed.
        alone: Whether it runs alone, as it measures speed.
    """

    module: str
    limit_s: float
    advice: str
    alone: bool = False


CHECKS = {
    "environment": Check(
        "machine",
        25,
        "install a build of torch for this driver's CUDA; without NVML use --share everywhere",
        alone=True,
    ),
    "gpu_tests": Check("machine", 160, "run `pytest -n 0 --device cuda TEST` for each that failed, and report it"),
    "parity": Check("numbers", 160, "cache with `cache.precision = float32` until it is explained, and report it"),
    "given_teacher": Check("numbers", 160, "train the teacher with kdpipe, and report the error"),
    "losses": Check(
        "numbers", 160, "a difference: do not use this loss on this GPU; waits cost speed only. Report either"
    ),
    "reproducible": Check("robustness", 160, "see GPUs in docs/batch-jobs.md; report which files differ"),
    "memory": Check("robustness", 160, "choose batches that fit, and `precision` other than float16; report the error"),
    "qat": Check("numbers", 160, "set `device = cpu` for compress, and report it"),
    "second_job": Check("robustness", 160, "start one job for each GPU by CUDA_VISIBLE_DEVICES; report the exit code"),
    "two_ranks": Check("robustness", 160, "train in one process; NCCL_DEBUG=INFO prints NCCL's log"),
    "stage_one": Check(
        "speed", 70, "name the fastest `cache.precision` in the recipe, where auto took another", alone=True
    ),
    "stage_two": Check("speed", 60, "a larger batch, and `target_loading` in docs/performance.md", alone=True),
    "compiled": Check("robustness", 75, "leave `train.compile` at false, and report it", alone=True),
    "photographs": Check("speed", 30, "more `data.num_workers`, files on a local disk", alone=True),
    "cifar100": Check("published", 60, "compare with the published accuracies only after 240 epochs", alone=True),
}
"""The checks in order."""

TOTAL_S = 480.0
"""Seconds after which no further check is started; those that run then get what is left."""

MIN_LEFT_S = 5.0


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
    found = run_all(options)
    sys.exit(0 if all(map(passed, found.values())) else 1)


def run_check(name: str, options: argparse.Namespace) -> None:
    """Run one check in this process; its rows go to a file, one by one."""
    from gpu_checks import Settings

    check = getattr(import_module(f"gpu_checks.{CHECKS[name].module}"), name)
    with rows_file(options, name).open("w") as file:
        for row in check(Settings(options.device, options.out.absolute(), toy=options.toy, data=options.data)):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


def run_all(options: argparse.Namespace) -> dict[str, Result | None]:
    """Run the checks that have no result yet; return the results of all, None for those that did not run."""
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    path, deadline = options.out / "acceptance.json", time.monotonic() + options.limit
    found: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    wanted = list(options.only or CHECKS)
    due = [one for one in wanted if one in options.again or one not in found or "cut_off" in found[one]]
    for name, result in run_in_groups(due, options, deadline):
        if result is None:
            print(f"{name}: no time left; run the same command again to continue", flush=True)
            continue
        print_check(name, result)
        found[name] = result
        found = {known: found[known] for known in CHECKS if known in found}
        replace(path, json.dumps(found, indent=1) + "\n")
        replace(options.out / "acceptance.md", markdown(found))
    return {name: found.get(name) for name in wanted}


def run_in_groups(
    names: list[str], options: argparse.Namespace, deadline: float
) -> Iterator[tuple[str, Result | None]]:
    """Run checks that share the machine side by side, others alone; yield what each found as it ends."""
    groups: list[list[str]] = []
    for name in names:
        if CHECKS[name].alone or not groups or CHECKS[groups[-1][0]].alone:
            groups.append([])
        groups[-1].append(name)
    for group in groups:
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
            running = {pool.submit(run_apart, name, options, deadline): name for name in group}
            try:
                for one in as_completed(running):
                    yield running[one], one.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C, which ends the processes that run


def run_apart(name: str, options: argparse.Namespace, deadline: float) -> Result | None:
    """Run a check in a process of its own, ended with all that it started at its limit; None if no time is left."""
    started = time.monotonic()
    left = deadline - started
    if left < MIN_LEFT_S:
        return None
    limit_s = left if options.toy else min(CHECKS[name].limit_s, left)
    log = options.out / "logs" / f"{name}.txt"
    rows_file(options, name).unlink(missing_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(command_of(name), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(limit_s)
            ended = ""
        except subprocess.TimeoutExpired:
            end_with_children(process)
            ended = f"ended after {limit_s:.0f} s"
    result: Result = {"rows": read_rows(options, name), "seconds": round(time.monotonic() - started, 1)}
    if ended and limit_s == left:
        result["cut_off"] = ended
    elif process.returncode:
        result["error"] = f"{log.read_text(errors='replace').strip()[-2000:]}\n{ended}".strip()
    return result


def command_of(name: str) -> list[str]:
    return [sys.executable, __file__, *sys.argv[1:], "--check", name]


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, also those with a session of their own."""
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def rows_file(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) / "logs" / f"{name}.jsonl"


def read_rows(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Return the rows of a check so far; a line that was cut is left out."""
    path = rows_file(options, name)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def replace(path: Path, text: str) -> None:
    """Write a file at once, so that a kill leaves the former one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def passed(result: Result | None) -> bool:
    return bool(result) and not problem(result) and all(row["met"] is not False for row in result["rows"])


def problem(result: Result) -> str:
    """Return why a check did not run to its end, in one line; an empty text if it did."""
    if "cut_off" in result:
        return f"cut off, {result['cut_off']}: run the same command again"
    error: str | None = result.get("error")
    return "" if error is None else (error.splitlines() or ["it printed nothing"])[-1]


def print_check(name: str, result: Result) -> None:
    state = "ok" if passed(result) else "did not end" if problem(result) else "a limit is missed"
    print(f"{name}: {state}, {result['seconds']} s", flush=True)
    for row in result["rows"]:
        print("  " + " | ".join(cells(row)), flush=True)
    if problem(result):
        print("  " + result.get("error", problem(result)).replace("\n", "\n  "), flush=True)


def markdown(found: dict[str, Result]) -> str:
    """Return the results as one table, and what to do about those that are not as they should be."""
    lines = ["| check | what | measured | limit | met |", "|---|---|---|---|---|"]
    for name, result in found.items():
        lines += ["| " + " | ".join((name, *cells(row))) + " |" for row in result["rows"]]
        if problem(result):
            lines.append(f"| {name} | did not end | {problem(result).replace('|', '/')[:200]} | | **no** |")
    failed = [name for name, result in found.items() if not passed(result)]
    advice = [f"- **{name}**: {CHECKS[name].advice} (`logs/{name}.txt`)." for name in failed]
    return "\n".join([*lines, *(["", "What to do:", ""] if failed else []), *advice]) + "\n"


def cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    measured = f"{row['measured']:.4g}" if isinstance(row["measured"], float) else str(row["measured"])
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    return row["what"], measured.replace("|", "/").replace("\n", " "), row["limit"], met


if __name__ == "__main__":
    main()

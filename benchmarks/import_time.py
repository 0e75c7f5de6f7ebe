"""How long `import kdpipe` takes, against its limit of 50 ms: a notebook, `--help` and a plug-in pay it every time.

Command: uv run python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time

LIMIT_MS = 50.0
NUM_TURNS = 21


def run_ms(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    variants = {"import kdpipe": "import kdpipe", "import kdpipe.losses": "import kdpipe.losses"}
    extra: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(NUM_TURNS):
        bare = run_ms("pass")
        for name, code in variants.items():
            extra[name].append(run_ms(code) - bare)
    for name, times in extra.items():
        median = statistics.median(times)
        print(f"{name}: {median:.1f} ms, {median / LIMIT_MS:.2f} of the limit of {LIMIT_MS:.0f} ms")


if __name__ == "__main__":
    main()

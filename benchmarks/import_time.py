"""How long things take that a user waits for at the start, each against its limit, over a bare Python.

`import kdpipe` (a notebook, `--help` and a plug-in pay it every time), the first question of `kdpipe recipe new`, and
`kdpipe recipe check`, which loads torch; `import torch` alone is there to compare.

Command: uv run python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits.toml"

ASK = """
from kdpipe.pipeline.recipe import new
new.is_terminal, new.input = (lambda: True), exit
new.new_recipe(None, {}, yes=False)
"""
CHECK = f"""
import sys
from kdpipe.pipeline.entry import main
sys.argv = ["kdpipe", "recipe", "check", {str(RECIPE)!r}]
main()
"""

VARIANTS: dict[str, tuple[str, float, int]] = {
    "import kdpipe": ("import kdpipe", 50, 21),
    "import kdpipe.losses": ("import kdpipe.losses", 50, 21),
    "recipe new, first question": (ASK, 1000, 11),
    "recipe check": (CHECK, 3000, 5),
    "import torch": ("import torch", 3000, 5),
}
"""Code, limit in milliseconds, and number of turns."""


def run_ms(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    extra: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(max(turns for _, _, turns in VARIANTS.values())):
        bare = run_ms("pass")
        for name, (code, _, turns) in VARIANTS.items():
            if turn < turns:
                extra[name].append(run_ms(code) - bare)
    for name, times in extra.items():
        median, limit = statistics.median(times), VARIANTS[name][1]
        print(f"{name}: {median:.1f} ms, {median / limit:.2f} of the limit of {limit:.0f} ms")


if __name__ == "__main__":
    main()

"""Cells of a notebook: code whose text only `linecache` knows, and whose module is `__main__`."""

import linecache
import textwrap
from typing import Any


class Notebook:
    """A notebook in which cells run.

    Attributes:
        names: What the cells have defined.
    """

    num_cells = 0

    def __init__(self, **names: Any) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__", **names}

    def run(self, cell: str) -> None:
        """Run a cell."""
        Notebook.num_cells += 1
        code, file = textwrap.dedent(cell), f"<cell {Notebook.num_cells}>"
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        exec(compile(code, file, "exec"), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

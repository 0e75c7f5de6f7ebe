"""`kdpipe store`: look into target stores, check them, mend them, make them smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.command import AsJson, guarded, print_json

store_app = typer.Typer(help="Look into target stores, check and mend them.", no_args_is_help=True)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]


@store_app.command("info")
def store_info(path: StorePath, as_json: AsJson = False) -> None:
    """Say what a store holds. Whose outputs, for which samples, on which views, and what is missing."""
    with guarded():
        from pipeline.store_info import print_store_info, read_store_info

        info = read_store_info(path)
        if as_json:
            print_json(info)
        else:
            print_store_info(info)

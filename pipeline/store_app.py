"""`kdpipe store`: look into target stores, check them, mend them, make them smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.job import walking
from pipeline.session.options import AsJson, Asked, Overrides, RecipePath, RunFolder, with_options
from pipeline.session.paths import named
from pipeline.terminal.output import guarded, print_json, printable

store_app = typer.Typer(help="Look into target stores, check and mend them.", no_args_is_help=True)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
Recompute = Annotated[
    int | None, typer.Option("--recompute", metavar="K", min=1, help="Also ask the teacher of --recipe for K samples.")
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", metavar="RECIPE", help="Whose teacher is asked.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Which samples are asked for.")]
Keep = Annotated[int, typer.Option("--keep", metavar="N", help="How many views stay.")]


@store_app.command("info")
def store_info(path: StorePath, as_json: AsJson = False) -> None:
    """Say what a store holds. Whose outputs, for which samples, on which views, what is missing, who is at it."""
    with guarded():
        from pipeline.commands.store.info import print_store_info, read_store_info

        info = read_store_info(path)
        if as_json:
            print_json(info)
        else:
            print_store_info(info)


@store_app.command("ls")
def store_ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to look through.")], as_json: AsJson = False
) -> None:
    """List the stores below a folder, a line each. A broken one with its fault."""
    with guarded():
        from pipeline.commands.store.ls import list_stores, print_stores

        stores = list_stores(folder)
        if as_json:
            print_json({"folder": str(folder), "stores": stores})
        else:
            print_stores(stores)


@store_app.command("verify")
def store_verify(
    path: StorePath,
    recompute: Recompute = None,
    recipe: RecipeOption = None,
    set_: Overrides = None,
    run: RunFolder = None,
    *,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Read and check every byte of a store. Exit status 1 if anything is damaged, 3 if units are only missing."""
    if (recompute is None) != (recipe is None):
        raise typer.BadParameter("--recompute K and --recipe RECIPE go together: the recipe says which teacher to ask.")
    if recompute is None and (set_ or run or seed):
        raise typer.BadParameter("--set, --run and --seed are for --recompute K: they do nothing without it.")
    with guarded():
        from pipeline.commands.store import verify as store_check

        if recipe is not None:
            store_check.require_recipe(recipe, set_ or ())  # now: to check every byte may take hours
        verdict = store_check.verify(path, as_json)
        recomputed = None
        if recompute is not None and recipe is not None and not verdict.damaged:
            with walking(recipe, Asked(set_=set_, run=run, as_json=as_json)) as walk:
                recomputed = store_check.ask_teacher(path, walk, recompute, seed)
        if as_json:
            print_json({"path": str(path), **verdict.to_json(), "recomputed": recomputed and recomputed.to_json()})
        else:
            store_check.print_verdict(path, verdict, recomputed)
        store_check.leave(verdict, recomputed)


@store_app.command("repair")
@with_options
def store_repair(recipe: RecipePath, asked: Asked) -> None:
    """Check the recipe's store and compute again what is damaged, and only that. Then check it once more."""
    with guarded():
        from pipeline.commands.store import verify as store_check

        with walking(recipe, asked) as walk:
            repaired = store_check.repair(walk)
        if asked.as_json:
            print_json(store_check.repair_json(repaired))
        else:
            for path, (found, left, num_computed) in repaired.items():
                store_check.print_repair(path, found, left, num_computed)
        for _, left, _ in repaired.values():
            store_check.leave(left)


@store_app.command("rm-views")
def store_rm_views(path: StorePath, keep: Keep, as_json: AsJson = False) -> None:
    """Keep the first N views of a store and delete the others. More can be cached again later."""
    with guarded():
        from store.shrink import remove_views

        removed = remove_views(path, keep)
        if as_json:
            print_json(removed)
        else:
            typer.echo(
                f"{printable(str(path))}: {removed['num_views_removed']} views removed, {removed['num_views']} stay, "
                f"{removed['bytes_freed']:,} bytes freed"
            )


@store_app.command("transcode")
def store_transcode(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store to read, a folder or a URL.")],
    target: Annotated[Path, typer.Argument(metavar="DST", parser=named, help="Where the new one goes.")],
    *,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Keep the K largest logits.")] = None,
    temperatures: Annotated[
        tuple[float, float] | None, typer.Option(help="The range for which --top-k knows the rest [default: 1 20].")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16: narrow what is float32.")] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="N", help="Keep the first N views.")] = None,
    arrays: Annotated[
        list[str] | None, typer.Option("--array", metavar="NAME", help="Keep this array beside the logits; repeatable.")
    ] = None,
    logits_only: Annotated[bool, typer.Option("--logits-only", help="Keep nothing but the logits.")] = False,
    archive: Annotated[
        str | None, typer.Option(metavar="CODEC", help="zstd or blosc: pack the chunks; none: unpack them.")
    ] = None,
    level: Annotated[int | None, typer.Option(help="1 to 9, of the packing [default: 5].")] = None,
    keep_bits: Annotated[
        int | None, typer.Option("--keep-bits", metavar="BITS", help="Round mantissas to so many bits first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make another store of one, without the teacher. Top-k, narrower, fewer views, packed or unpacked."""
    if logits_only and arrays:
        raise typer.BadParameter("--logits-only and --array exclude each other.")
    with guarded():
        from pipeline.commands.store.transcode import print_transcoded, run_transcode, wanted_codec, wanted_temperatures
        from store import Change

        change = Change(
            top_k=top_k,
            temperatures=wanted_temperatures(temperatures),
            dtype=dtype,
            num_views=views,
            arrays=() if logits_only else tuple(arrays) if arrays else None,
            codec=wanted_codec(archive, level),
            keep_bits=keep_bits,
        )
        figures = run_transcode(source, target, change, as_json)
        if as_json:
            print_json({"source": source, "target": str(target), **figures})
        else:
            print_transcoded(source, target, figures)

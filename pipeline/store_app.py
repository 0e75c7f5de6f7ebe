"""Define `kdpipe store`: inspect, verify, repair and shrink target stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kdpipe.pipeline.job import open_run
from kdpipe.pipeline.session.guard import guarded
from kdpipe.pipeline.session.options import AsJson, CommonOptions, RecipePath, RunDir, SetOption, with_options
from kdpipe.pipeline.session.paths import output_path
from kdpipe.pipeline.terminal.output import print_result, printable

store_app = typer.Typer(help="Inspect, verify and repair target stores.", no_args_is_help=True)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
Recompute = Annotated[
    int | None,
    typer.Option("--recompute", metavar="K", min=1, help="Also recompute K samples with the teacher of --recipe."),
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", metavar="RECIPE", help="The recipe of the teacher.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Chooses the samples to recompute.")]
FollowLinks = Annotated[bool, typer.Option("--follow-links", help="Follow links that lead out of the store.")]
Keep = Annotated[int, typer.Option("--keep", metavar="N", help="Number of views to keep.")]


def _trust(path: Path, follow_links: bool) -> None:
    if follow_links:
        from kdpipe.store.fs import safe_read

        safe_read.follow_links(path)


@store_app.command("info")
def store_info(path: StorePath, *, follow_links: FollowLinks = False, as_json: AsJson = False) -> None:
    """Describe a store. Teacher, data, views, arrays, missing units, running jobs and encoding error."""
    with guarded():
        from kdpipe.pipeline.commands.store.info import print_store_info, read_store_info

        _trust(path, follow_links)
        info = read_store_info(path)
        print_result(as_json, info, lambda: print_store_info(info))


@store_app.command("verify")
def store_verify(
    path: StorePath,
    recompute: Recompute = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    run: RunDir = None,
    *,
    seed: Seed = 0,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every byte of a store. Exit status 1 if anything is damaged, 3 if units are only missing."""
    if (recompute is None) != (recipe is None):
        raise typer.BadParameter("--recompute K and --recipe RECIPE need each other.")
    if recompute is None and (set_ or run or seed):
        raise typer.BadParameter("--set, --run and --seed need --recompute K.")
    with guarded():
        from kdpipe.pipeline.commands.store import verify

        if recipe is not None:
            from kdpipe.pipeline.recipe.load import load_recipe

            load_recipe(recipe, set_ or (), os.environ)  # refuse it first: checking every byte may take hours
        _trust(path, follow_links)
        verdict = verify.verify(path, as_json)
        recomputed = None
        if recompute is not None and recipe is not None and not verdict.damaged:
            with open_run(recipe, CommonOptions(set_=set_, run=run, as_json=as_json)) as opened:
                recomputed = verify.recheck(path, opened, recompute, seed)
        document = {"path": str(path), **verdict.to_json(), "recomputed": recomputed and recomputed.to_json()}
        print_result(as_json, document, lambda: verify.print_verdict(path, verdict, recomputed))
        verify.exit_for(verdict, recomputed)


@store_app.command("advise")
def store_advise(
    place: Annotated[Path, typer.Argument(metavar="STORE|RECIPE", help="A store's folder, or a recipe.")],
    set_: SetOption = None,
    run: RunDir = None,
    *,
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="KL divergence from the exact soft labels to accept, in nats.")
    ] = 1e-3,
    as_json: AsJson = False,
) -> None:
    """Compare encodings of a teacher's logits. Bytes, fidelity and speed for a recipe's losses; one is recommended."""
    if not 0 < max_kl < float("inf"):
        raise typer.BadParameter(f"--max-kl is {max_kl:g}; give a number of nats above 0.")
    is_store = os.path.isdir(place)  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
    if is_store and (set_ or run):
        raise typer.BadParameter("--set and --run need a recipe, and this is a folder.")
    with guarded():
        from kdpipe.pipeline.commands.store import advise
        from kdpipe.stages.distillation.encoding_advice import advice_json

        if is_store:
            reports = advise.advise_store(place)
        else:
            with open_run(place, CommonOptions(set_=set_, run=run, as_json=as_json)) as opened:
                reports = advise.advise_run(opened)
        document = {"path": str(place), **advice_json(reports, max_kl)}
        print_result(as_json, document, lambda: advise.print_advice(reports, max_kl))


@store_app.command("repair")
@with_options
def store_repair(recipe: RecipePath, options: CommonOptions) -> None:
    """Recompute the damaged units of the recipe's store. Verifies it before and after."""
    with guarded():
        from kdpipe.pipeline.commands.store import verify

        with open_run(recipe, options) as run:
            repaired = verify.repair(run)
        print_result(options.as_json, verify.repair_json(repaired), lambda: verify.print_repair(repaired))
        for _, left, _ in repaired.values():
            verify.exit_for(left)


@store_app.command("rm-views")
def store_rm_views(path: StorePath, keep: Keep, as_json: AsJson = False) -> None:
    """Keep the first N views of a store and delete the others. More can be cached again later."""
    with guarded():
        from kdpipe.store.write.drop_views import drop_views

        removed = drop_views(path, keep)
        text = (
            f"{printable(str(path))}: {removed['num_views_removed']} views removed, {removed['num_views']} kept, "
            f"{removed['bytes_freed']:,} bytes freed"
        )
        print_result(as_json, removed, lambda: typer.echo(text))


@store_app.command("transcode")
def store_transcode(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store to read, a folder or a URL.")],
    target: Annotated[Path, typer.Argument(metavar="DST", parser=output_path, help="The folder of the new store.")],
    *,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="int8 or int4: bits a logit; dense: decode these, or a head.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Keep the K largest logits.")] = None,
    temperatures: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Range in which --top-k preserves the mass of the other classes [default: 1 20]."),
    ] = None,
    sampled_labels: Annotated[
        int | None, typer.Option("--sampled-labels", metavar="K", help="Sample K classes of each row, for T = 1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16: convert float32 arrays.")] = None,
    feature_dtype: Annotated[
        str | None, typer.Option("--feature-dtype", metavar="NAME", help="int8: 8-bit feature maps; float16: decode.")
    ] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="N", help="Keep the first N views.")] = None,
    arrays: Annotated[
        list[str] | None, typer.Option("--array", metavar="NAME", help="Keep this array with the logits; repeatable.")
    ] = None,
    logits_only: Annotated[bool, typer.Option("--logits-only", help="Keep only the logits.")] = False,
    archive: Annotated[
        str | None, typer.Option(metavar="CODEC", help="zstd or blosc: compress the chunks; none: decompress them.")
    ] = None,
    level: Annotated[int | None, typer.Option(help="Compression level, 1 to 9 [default: 5].")] = None,
    follow_links: FollowLinks = False,
    keep_bits: Annotated[
        int | None, typer.Option("--keep-bits", metavar="BITS", help="Round mantissas to this many bits first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a store without the teacher. Logits in fewer bytes, float16, fewer views, compressed or decompressed."""
    if logits_only and arrays:
        raise typer.BadParameter("--logits-only and --array exclude each other.")
    with guarded():
        from kdpipe.pipeline.commands.store.transcode import (
            parse_codec,
            parse_temperatures,
            print_transcoded,
            run_transcode,
        )
        from kdpipe.store import TranscodeOptions

        change = TranscodeOptions(
            encoding=encoding,
            top_k=top_k,
            temperatures=parse_temperatures(temperatures),
            sampled_labels=sampled_labels,
            dtype=dtype,
            feature_dtype=feature_dtype,
            num_views=views,
            arrays=() if logits_only else tuple(arrays) if arrays else None,
            codec=parse_codec(archive, level),
            keep_bits=keep_bits,
        )
        _trust(Path(source), follow_links)
        figures = run_transcode(source, target, change, as_json)
        document = {"source": source, "target": str(target), **figures}
        print_result(as_json, document, lambda: print_transcoded(source, target, figures))

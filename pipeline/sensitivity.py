"""What `kdpipe sensitivity` says, for people: the layers that INT8 hurts most, and what to do about them."""

from __future__ import annotations

from collections.abc import Sequence

from stages.compression.sensitivity import LayerSensitivity


def print_sensitivity(network: str, layers: Sequence[LayerSensitivity]) -> None:
    """The table, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    table = Table(box=box.SIMPLE, title=f"{network}: what INT8 costs, layer by layer", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for header in ("parameters", "KL won back if it stays float", "KL if it alone is INT8", "signal to noise, dB"):
        table.add_column(header, justify="right")
    for layer in layers:
        table.add_row(
            layer.path,
            f"{layer.num_parameters:,}",
            f"{layer.kl_spared:.2e}",
            f"{layer.kl_alone:.2e}",
            f"{layer.sqnr_db:.1f}",
        )
    console.print(table)
    console.print("KL in nats between what the float network says and what the calibrated one does, on training views.")
    console.print(f'A layer stays float with --set compress.quantize.exclude=["{layers[0].path}"].', markup=False)

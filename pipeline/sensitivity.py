"""Print the layers that INT8 affects most (`kdpipe sensitivity`)."""

from __future__ import annotations

from collections.abc import Sequence

from stages.compression.sensitivity import LayerSensitivity


def print_sensitivity(network: str, layers: Sequence[LayerSensitivity]) -> None:
    """Print the table to stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    table = Table(box=box.SIMPLE, title=f"{network}: INT8 sensitivity by layer", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for header in ("parameters", "KL recovered if float", "KL if only it is INT8", "signal to noise, dB"):
        table.add_column(header, justify="right")
    for layer in layers:
        table.add_row(
            layer.path,
            f"{layer.num_parameters:,}",
            f"{layer.kl_recovered:.2e}",
            f"{layer.kl_alone:.2e}",
            f"{layer.sqnr_db:.1f}",
        )
    console.print(table)
    console.print("KL divergence in nats of the calibrated network from the float one, on training views.")
    console.print(f'To keep a layer in float: --set compress.quantize.exclude=["{layers[0].path}"].', markup=False)

"""Print the INT8 sensitivity of layers."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.pipeline.terminal.output import console, new_table
from kdpipe.stages.compress.quantization.sensitivity import LayerSensitivity


def print_sensitivity(network: str, layers: Sequence[LayerSensitivity]) -> None:
    """Print the table to stdout, most sensitive layers first."""
    table = new_table(f"{network}: INT8 sensitivity by layer")
    table.add_column("layer", no_wrap=True)
    for header in ("parameters", "KL recovered if it stays float", "KL if it alone is INT8"):
        table.add_column(header, justify="right")
    for layer in layers:
        table.add_row(
            layer.path,
            f"{layer.num_parameters:,}",
            f"{layer.kl_recovered:.2e}",
            f"{layer.kl_alone:.2e}",
        )
    out = console()
    out.print(table)
    out.print("KL in nats between the outputs of the float and the calibrated network, on training views.")
    out.print(f'To keep a layer float: --set compress.quantize.exclude=["{layers[0].path}"].')

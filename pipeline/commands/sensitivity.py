"""Print the INT8 sensitivity of layers."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.stages.compress.compress import compressed_root, float_job_dir, student_sensitivity
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.compress.quantization.sensitivity import LayerSensitivity


def print_sensitivity(network: str, layers: Sequence[LayerSensitivity]) -> None:
    """Print the table to stdout, most sensitive layers first."""
    headers = ["layer", "parameters", "KL recovered if it stays float", "KL if it alone is INT8"]
    cells = [
        [layer.path, f"{layer.num_parameters:,}", f"{layer.kl_recovered:.2e}", f"{layer.kl_alone:.2e}"]
        for layer in layers
    ]
    out = console()
    print_table(out, Table(f"{network}: INT8 sensitivity by layer", headers, cells))
    out.print("KL in nats between the outputs of the float and the calibrated network, on training views.")
    out.print(f'To keep a layer float: --set compress.quantize.exclude=["{layers[0].path}"].')


def run_sensitivity(run: Run, num_batches: int) -> tuple[str, list[LayerSensitivity]]:
    """Return the INT8 sensitivity of each layer of the first seed's float student, and that student's name."""
    config, student = run.recipe.compress, run.recipe.student
    root = compressed_root(run.folder, config)
    fine_tuning = build_fine_tuning(student, student.seeds[0], run.distillation, run.context, root)
    return float_job_dir(config, fine_tuning).path.name, student_sensitivity(config, fine_tuning, num_batches)

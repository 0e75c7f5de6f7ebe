"""The names of a student's networks, the same in progress, tables and pages; their kinds are their names in paths."""

from __future__ import annotations

from pathlib import Path

from kdpipe.stages.compress.targets import SCHEMES, TITLES


def network_name(kind: str, *, prunes: bool) -> str:
    """Return the name of a kind of compressed network, such as "pruned + INT8"; `prunes` if the chain does."""
    first, dash, variant = kind.partition("-")
    is_integer = first in SCHEMES
    name = first.upper() if is_integer else first
    if variant.endswith("alone"):
        return f"{network_name(kind.removesuffix('-alone'), prunes=prunes)}, hard labels"
    if variant in TITLES:
        return f"{network_name(first, prunes=prunes)} for {TITLES[variant]}"
    if variant == "ptq":
        return f"{name}, calibrated"
    return f"pruned + {name}" if is_integer and prunes and not dash else name


def compressed_name(student: str | None) -> str:
    """Return the name of the folder of compressed students; of a given file with its name, or that of its job."""
    if student is None:
        return "compressed"
    path = Path(student)
    return f"compressed-{path.parent.name if path.stem == 'model' and path.parent.name else path.stem}"

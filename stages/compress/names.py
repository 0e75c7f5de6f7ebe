"""The names of a student's networks, the same in progress, tables and pages; their kinds are their names in paths."""

from __future__ import annotations


def network_name(kind: str, *, prunes: bool) -> str:
    """Return the name of a kind of compressed network, such as "pruned + INT8"; `prunes` if the chain does."""
    first, dash, variant = kind.partition("-")
    is_integer = first.startswith("int")
    name = first.upper() if is_integer else first
    if variant.endswith("alone"):
        return f"{network_name(kind.removesuffix('-alone'), prunes=prunes)}, hard labels"
    if variant == "ptq":
        return f"{name}, calibrated"
    return f"pruned + {name}" if is_integer and prunes and not dash else name

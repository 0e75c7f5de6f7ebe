"""Comparison of the files of a disturbed run with those of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

from support.made_store import folder_bytes

COMPARED = ("teacher/model", "students/*/model", "compressed/*/model", "compressed/*/model.int8")


def differing_files(run: Path, undisturbed: Path) -> list[str]:
    """Return networks, artifacts and store files that differ between two runs, or that only one of them has."""
    found, wanted = _files(run), _files(undisturbed)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _files(run: Path) -> dict[str, bytes]:
    networks = [
        file
        for pattern in COMPARED
        for suffix in (".safetensors", ".onnx", ".pt2")
        for file in run.glob(pattern + suffix)
    ]
    assert networks
    store = {f"store.zarr/{name}": raw for name, raw in folder_bytes(run / "store.zarr").items()}
    return {str(file.relative_to(run)): file.read_bytes() for file in networks} | store

"""Map the views of a store's arrays, their shards checked against the committed checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.layout import StoreLayout, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import Marker
from kdpipe.store.format.shard import is_committed_file, shard_path, shard_shape
from kdpipe.store.read.mmap_files import FileRegion, MappingUnsupported, map_files

Verify = Literal["first", "always", "never"]
"""When mapped shards are checked: see `TargetStore.verifying`."""

NOT_COMMITTED = "its bytes are not those that were committed"


class MappedViews:
    """The arrays of a store, each mapped into one address range at first use.

    Attributes:
        verify: When shards are checked.
        ready: By array and view, the rows [N, *row_shape] of what is mapped and needs no check.
    """

    def __init__(
        self, path: Path, manifest: Manifest, layout: StoreLayout, markers: Mapping[Unit, Marker], verify: Verify
    ) -> None:
        self.verify = verify
        self.ready: dict[tuple[str, int], NDArray[Any]] = {}
        self._path = path
        self._manifest = manifest
        self._layout = layout
        self._markers = markers
        self._ranges: dict[str, NDArray[Any]] = {}
        self._unmappable: dict[str, str] = {}

    def why_not(self, name: str) -> str | None:
        """Return why an array cannot be mapped; None where it is."""
        if name not in self._ranges and name not in self._unmappable:
            self._open_range(name)
        return self._unmappable.get(name)

    def view(self, name: str, view: int) -> NDArray[Any]:
        """Return a view of a mapped array, [N, *row_shape]. Raises StoreError, naming the file, if it is damaged."""
        if (name, view) not in self.ready:
            if self.verify == "always":
                self.ready = {key: rows for key, rows in self.ready.items() if key[0] != name}
            if self.verify != "never":
                for unit in self._layout.units([view]):
                    self._check_shard(name, unit)
            self.ready[name, view] = self._ranges[name][view]
        return self.ready[name, view]

    def whole(self, name: str) -> NDArray[Any]:
        """Return all views of a mapped array, [V, N, *row_shape]."""
        for view in range(self._layout.num_views):
            self.view(name, view)
        return self._ranges[name][:, : self._layout.num_rows]

    def _check_shard(self, name: str, unit: Unit) -> None:
        """Read a shard file in pieces; a read reports a bad disk, where access to a mapped page kills the process."""
        file = shard_path(self._path, self._manifest.spec(name), unit)
        try:
            whole = is_committed_file(file, self._markers[unit].files[name], self._path)
        except OSError as error:
            raise StoreError(damaged(file, unit, f"it cannot be read ({error.strerror})")) from error
        if not whole:
            raise StoreError(damaged(file, unit, NOT_COMMITTED))

    def _open_range(self, name: str) -> None:
        """Map all shards of an array contiguously, or record why that is not possible."""
        spec, layout = self._manifest.spec(name), self._layout
        if self._manifest.codec is not None:
            self._unmappable[name] = "the archive profile compresses chunks (see `kdpipe store transcode`)"
            return
        shape, unit_bytes = shard_shape(spec, layout.unit_rows), layout.unit_rows * spec.row_bytes
        units, num_units = layout.units(), layout.num_views * layout.num_shards
        regions = [
            FileRegion(
                shard_path(self._path, spec, unit),
                (unit.view * layout.num_shards + unit.shard) * unit_bytes,
                shape.data_bytes(unit.num_rows),
            )
            for unit in units
        ]
        try:
            mapped = map_files(regions, num_units * unit_bytes)
        except MappingUnsupported as error:
            self._unmappable[name] = str(error)
            return
        rows = layout.num_shards * layout.unit_rows
        self._ranges[name] = mapped.view(spec.little).reshape(layout.num_views, rows, *spec.row_shape)


def damaged(file: Path, unit: Unit, what: str) -> str:
    """Return the message about a damaged file."""
    return f"{file} ({unit}) is damaged: {what}. `kdpipe store repair RECIPE` computes its unit again."

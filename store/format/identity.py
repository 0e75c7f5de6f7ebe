"""Identity of a store: the inputs that decide its numbers, and the fingerprint over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def sha256_of(value: Any) -> str:
    """Return the hexadecimal sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


PLAIN = {"precision": "float32", "memory_format": "contiguous", "compile": False, "folded": False}
"""How the teacher of a store without a record was computed."""


def describe_computation(compute: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    """Return as text how a store's teacher was computed, and what its trial found."""
    names = {**PLAIN, **compute}
    settings = [str(names[key]) for key in ("precision", "memory_format")] + ["compiled"] * bool(names["compile"])
    settings += ["folded batch norms"] * bool(names["folded"])
    on = f" on {trial['device']}" if "device" in trial else ""
    parts = [", ".join(settings) + on, *([f"batches of {trial['batch_size']}"] if "batch_size" in trial else [])]
    parts += [f"{trial['threads']} threads"] if "threads" in trial else []
    if trial.get("kl"):
        kl = ", ".join(f"{nats} at T={temperature}" for temperature, nats in trial["kl"].items())
        flips = f"top-1 flips {trial.get('top1_flips')} of {trial.get('num_images')}"
        parts.append(f"against float32: KL {kl}, {flips}, largest error {trial.get('largest_error')}")
    parts += [f"{array}: relative rms {error}" for array, error in trial.get("features", {}).items()]
    parts += [f"not {name}: {why}" for name, why in trial.get("dropped", {}).items()]
    return "; ".join(parts)


@dataclass(frozen=True)
class Identity:
    """Teacher, data set and views of a store, as JSON objects. Independent of the machine: no paths, no dates.

    The list of arrays and the number of views are not included, so that a store can gain layers or views and keep
    its fingerprint. Arrays and their precision are compared one by one.

    Attributes:
        compute: How the teacher was computed: the keys of PLAIN; empty where it is that. Of a store that is wanted, it
            has only the keys that are asked for.
    """

    teacher: Mapping[str, Any]
    data: Mapping[str, Any]
    views: Mapping[str, Any]
    compute: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        compute = {"compute": dict(self.compute)} if self.compute else {}
        return {"teacher": dict(self.teacher), "data": dict(self.data), "views": dict(self.views), **compute}

    @property
    def fingerprint(self) -> str:
        return sha256_of(self.to_json())

"""Format the model card of a compressed student as Markdown, from card.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SNIPPET = """import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession("{file}")
scale = json.loads(session.get_modelmeta().custom_metadata_map["normalization"])
mean, std = (np.array(scale[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
logits = session.run(["logits"], {{"images": (images / np.float32(255) - mean) / std}})[0]  # images: uint8 {shape}"""

TEXT = """# {name}: {model}, {state}

Made by kdpipe {kdpipe}. It classifies images of {size} (channels, height, width) into {num_classes} classes: {classes}.

{origin}

{table}

onnxruntime on {num_threads} thread(s) of {cpu}; medians, the files in turn.

## How to run it

```python
{snippet}
```

Any batch size runs, 1 included. `class_names`, `normalization` and `image_shape` are in the file's metadata. Crop and \
resize images to that size first, as in the recipe's data section.

## Files

{files}
"""


def card_text(card: Mapping[str, Any]) -> str:
    """Return the Markdown of a card."""
    shape, scheme = card["input"]["shape"], card["architecture"].get("quantized", "")
    states = ["pruned"] * ("pruned" in card["networks"]) + [scheme.upper()] * bool(scheme)
    onnx_file = max((name for name in card["files"] if name.endswith(".onnx")), key=len)
    return TEXT.format(
        name=_escape(card["name"]),
        model=_escape(card["architecture"]["model"]),
        state=" and ".join(states) or "unchanged",
        kdpipe=card["kdpipe"],
        size=" x ".join(map(str, shape[1:])),
        num_classes=len(card["class_names"]),
        classes=_shortened(card["class_names"]),
        origin="\n".join(_origin(card)),
        table="\n".join(_table(card)),
        num_threads=card["latency"]["num_threads"],
        cpu=card["latency"]["cpu"],
        snippet=SNIPPET.format(file=onnx_file, shape=f"[{', '.join(map(str, shape))}]"),
        files="\n".join(
            f"- `{name}`: {file['bytes']:,} bytes. {_purpose(name)}" for name, file in card["files"].items()
        ),
    )


def _origin(card: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Data: {_escape(card['data']['name'])}; seed {card['seed']}."
    for teacher in card["teachers"]:
        yield (
            f"- Teacher: {_escape(teacher['model'])}, weights {teacher['weights_sha256'][:12]}, from the store with "
            f"fingerprint {teacher['fingerprint'][:12]} ({teacher['num_views']} views)."
        )
    yield f"- Weights of this student: {card['weights_sha256'][:12]} (sha256, the first 12 digits)."
    if excluded := card.get("excluded"):
        yield f"- Not pruned: {_shortened([f'{path} ({why})' for path, why in excluded.items()])}."
    if floats := card.get("float_nodes"):
        yield f"- Not in integers: {_shortened(floats)}."


def _table(card: Mapping[str, Any]) -> Iterator[str]:
    sizes = card["latency"]["batch_sizes"]
    heads = [f"latency ms, batch {size} (p95)" for size in sizes]
    columns = ["network", "test accuracy %", "agrees with the teacher %", "parameters", "MACs", "file, bytes", *heads]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name, row in card["networks"].items():
        times = card["latency"]["files"].get(name, {})
        agreement = "-" if row["agreement"] is None else f"{100 * row['agreement']:.2f}"
        macs = "-" if row["num_macs"] is None else f"{row['num_macs']:,}"
        cells = [name, f"{100 * row['accuracy']:.2f}", agreement, f"{row['num_parameters']:,}", macs]
        cells += [f"{row['onnx_bytes']:,}", *(_time(times.get(str(size))) for size in sizes)]
        yield f"| {' | '.join(cells)} |"


def _purpose(name: str) -> str:
    if name.endswith(".safetensors"):
        return "The weights; `kdpipe.stages.compress.artifacts.load.rebuild(path)` builds the network from its header."
    if name.endswith(".pt2"):
        needs = ", after `import torch.ao.quantization.fx._decomposed`" if "int8" in name else ""
        return f"`torch.export.load(path).module()`{needs}."
    return "For onnxruntime; " + ("float32." if name == "model.onnx" else "integers where they are faster.")


def _time(pair: Mapping[str, float] | None) -> str:
    return "-" if pair is None else f"{pair['p50_ms']:.3f} ({pair['p95_ms']:.3f})"


def _escape(text: str) -> str:
    """Escape a name for Markdown: class names are untrusted input."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:80])
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", shown)


def _shortened(names: list[str]) -> str:
    names = [_escape(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

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


def card_text(card: Mapping[str, Any]) -> str:
    """Return the Markdown of a card."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    architecture, shown = card["architecture"], card["input"]["shape"]
    yield f"# {_escape(card['name'])}: {_escape(architecture['model'])}, {_state(card)}"
    yield ""
    yield (
        f"Made by kdpipe {card['kdpipe']}. It classifies images of {shown[1]} x {shown[2]} x {shown[3]} (channels, "
        f"height, width) into {len(card['class_names'])} classes: {_shortened(card['class_names'])}."
    )
    yield ""
    yield from _origin(card)
    yield ""
    yield from _table(card)
    yield ""
    yield "## How to run it"
    yield ""
    onnx = [name for name in card["files"] if name.endswith(".onnx")]
    yield "```python"
    yield SNIPPET.format(file=sorted(onnx, key=len)[-1], shape=f"[{', '.join(map(str, shown))}]")
    yield "```"
    yield ""
    yield (
        "Any batch size runs, 1 included. `class_names`, `normalisation` and `image_shape` are in the file's "
        "metadata. Crop and resize images to that size first, as in the recipe's data section."
    )
    yield ""
    yield from _files(card)


def _state(card: Mapping[str, Any]) -> str:
    architecture = card["architecture"]
    words = ["pruned"] if "pruned" in card["networks"] else []
    if scheme := architecture.get("quantized"):
        words.append(scheme.upper())
    return " and ".join(words) or "unchanged"


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
        shown = [_time(times.get(str(size))) for size in sizes]
        agreement = "-" if row["agreement"] is None else f"{100 * row['agreement']:.2f}"
        yield (
            f"| {name} | {100 * row['accuracy']:.2f} | {agreement} | {row['num_parameters']:,} | "
            f"{_count(row['num_macs'])} | {row['onnx_bytes']:,} | {' | '.join(shown)} |"
        )
    yield ""
    threads = card["latency"]["num_threads"]
    on = "one thread" if threads == 1 else f"{threads} threads"
    yield f"onnxruntime on {on} of {card['latency']['cpu']}; medians, the files in turn."


def _files(card: Mapping[str, Any]) -> Iterator[str]:
    yield "## Files"
    yield ""
    for name, file in card["files"].items():
        yield f"- `{name}`: {file['bytes']:,} bytes. {_purpose(name)}"


def _purpose(name: str) -> str:
    if name.endswith(".safetensors"):
        return "The weights; `stages.rebuild.rebuild(path)` builds the network from its header."
    if name.endswith(".pt2"):
        return "`torch.export.load(path).module()`" + (
            ", after `import torch.ao.quantization.fx._decomposed`." if "int8" in name else "."
        )
    return "For onnxruntime; " + ("float32." if name == "model.onnx" else "integers where they are faster.")


def _time(pair: Mapping[str, float] | None) -> str:
    return "-" if pair is None else f"{pair['p50_ms']:.3f} ({pair['p95_ms']:.3f})"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _escape(text: str) -> str:
    """Escape a name for Markdown: class names are untrusted input."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:80])
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", shown)


def _shortened(names: list[str]) -> str:
    names = [_escape(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

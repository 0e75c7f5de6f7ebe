"""Format the model cards of a compressed student, and their ranking, as Markdown, from card.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdpipe.stages.compress.artifacts.latency_record import timed_in
from kdpipe.stages.compress.targets import TITLES
from kdpipe.stages.evaluation.main_metric import main_percent, metric_of

RUN_FILES = {"openvino": "model.xml", "executorch": "model.pte"}
"""The file that predict.py runs, by its runtime; model.onnx in onnxruntime."""

SNIPPET = """from predict import load_image, predict  # predict.py, beside {file}: {runtime}, numpy, pillow
{outputs} = predict([load_image("image.png")])  # uint8 {shape} to [batch, {width}]"""

TEXT = """# {name}: {model}, {network}

Made by kdpipe {kdpipe}. From images of {size} (channels, height, width) it {outputs}.

{origin}

{table}

{num_threads} thread(s) of {cpu}; in onnxruntime where the row says nothing else; medians, the files in turn.

## How to run it

```bash
python predict.py image.png ...
```

```python
{snippet}
```

Any batch size runs, 1 included. {pixels} `class_names`, `normalization`, `image_shape` and `test_crop` are in the \
metadata of model.onnx too.

## Files

{files}
"""

OUTPUTS = {"multilabel": "any of {} labels", "regression": "{} numbers"}
"""What is predicted, by task; else classes."""

EMBEDDING = "returns an embedding: images are compared by the cosine of theirs"

RANKING = """# {name}

Recommended: [{best}]({best}/README.md): {reason}. Each folder holds one network, ready to hand over.

{table}

Ranked: first those that reach 99 % of the best {metric}, the smallest file ahead; last one made for another target \
than the others. {num_threads} thread(s) of {cpu}; in onnxruntime where the row says nothing else; medians, the files \
in turn.
"""


def card_text(card: Mapping[str, Any]) -> str:
    """Return the Markdown of a network's card."""
    shape = card["input"]["shape"]
    num_classes, is_embedding = len(card["class_names"]), card.get("task") == "embedding"
    predicted = OUTPUTS.get(str(card.get("task")), "one of {} classes").format(num_classes)
    outputs, width = ("embeddings", "D") if is_embedding else ("logits", num_classes)
    return TEXT.format(
        name=_escape(card["name"]),
        model=_escape(card["architecture"]["model"]),
        network=card["network"],
        kdpipe=card["kdpipe"],
        size=" x ".join(map(str, shape[1:])),
        outputs=EMBEDDING if is_embedding else f"predicts {predicted}: {_shortened(card['class_names'])}",
        origin="\n".join(_origin(card)),
        table="\n".join(_table(card, card["networks"])),
        num_threads=card["latency"]["num_threads"],
        cpu=card["latency"]["cpu"],
        snippet=SNIPPET.format(
            outputs=outputs,
            shape=f"[{', '.join(map(str, shape))}]",
            width=width,
            file=RUN_FILES.get(card.get("runtime", ""), "model.onnx"),
            runtime=card.get("runtime", "onnxruntime"),
        ),
        pixels=_pixels(card["input"]),
        files="\n".join(
            f"- `{name}`: {file['bytes']:,} bytes. {_purpose(name, card['architecture'])}"
            for name, file in card["files"].items()
        ),
    )


def ranking_text(card: Mapping[str, Any]) -> str:
    """Return the Markdown of the ranking of a seed's networks."""
    return RANKING.format(
        name=_escape(card["name"]),
        best=card["ranking"][0],
        reason=card["reason"],
        metric=metric_of(card["networks"][card["ranking"][0]]).title,
        table="\n".join(_table(card, ["teacher", *card["ranking"]])),
        num_threads=card["latency"]["num_threads"],
        cpu=card["latency"]["cpu"],
    )


def _pixels(inputs: Mapping[str, Any]) -> str:
    """Return how an image of another size becomes the network's input."""
    _, _, height, width = inputs["shape"]
    if height != width:
        return f"Images must have {width} x {height} pixels."
    share = "" if inputs["test_crop"] == 1 else f"{inputs['test_crop']:g} of "
    return (
        f"An image of another size is cropped to {share}the largest centered square and resized to {width} x {height} "
        "with Pillow's bilinear filter (antialiased), as in testing."
    )


def _origin(card: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Data: {_escape(card['data']['name'])}; seed {card['seed']}."
    for teacher in card["teachers"]:
        yield (
            f"- Teacher: {_escape(teacher['model'])}, weights {teacher['weights_sha256'][:12]}, from the store with "
            f"fingerprint {teacher['fingerprint'][:12]} ({teacher['num_views']} views)."
        )
    own = card["networks"][card["network"]]
    yield f"- Weights of this student: {own['weights_sha256'][:12]} (sha256, the first 12 digits)."
    if removed := card["architecture"].get("removed_blocks"):
        yield f"- Removed blocks: {_shortened(removed)}."
    if ranks := card["architecture"].get("ranks"):
        yield f"- Layers in two, of a low rank: {_shortened([f'{path} ({rank})' for path, rank in ranks.items()])}."
    was_pruned = not {"widths", "removed_blocks", "ranks"}.isdisjoint(card["architecture"])
    if was_pruned and (excluded := card["networks"].get("pruned", {}).get("excluded")):
        yield f"- Not pruned: {_shortened([f'{path} ({why})' for path, why in excluded.items()])}."
    if int4 := card["architecture"].get("int4_layers"):
        yield f"- Weights of 4 bits: {_shortened(int4)}."
    if card["architecture"].get("quantizer") == "onnxruntime":
        yield "- INT8: calibrated by onnxruntime, without training."
    if floats := own["float_nodes"]:
        yield f"- Not in integers: {_shortened(floats)}."


def _table(card: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    sizes, metric = card["latency"]["batch_sizes"], metric_of(next(iter(card["networks"].values())))
    heads = [f"latency ms, batch {size} (p95)" for size in sizes]
    columns = [
        "network",
        f"test {metric.title} % (95 % interval)",
        "agrees with the teacher %",
        "parameters",
        "MACs",
        "file, bytes",
        *heads,
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name in names:
        row = card["networks"].get(name)
        if row is None:  # a teacher that was not measured
            continue
        agreement = "-" if row["agreement"] is None else f"{100 * row['agreement']:.2f}"
        macs = "-" if row["num_macs"] is None else f"{row['num_macs']:,}"
        interval = row.get(f"{metric.name}_interval")
        sure = "" if interval is None else f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
        cells = [name, f"{main_percent(row):.2f}{sure}", agreement, f"{row['num_parameters']:,}", macs]
        size = "-" if row["onnx_bytes"] is None else f"{row['onnx_bytes']:,}"
        yield f"| {' | '.join([*cells, size, *_times(card['latency'], name)])} |"
        for target, found in row.get("runtimes", {}).items():
            accuracy = "-" if found["accuracy"] is None else f"{100 * found['accuracy']:.2f}"
            cells = [f"{name} in {TITLES[target]}", accuracy, "-", *cells[3:5], f"{found['bytes']:,}"]
            yield f"| {' | '.join([*cells, *_times(card['latency'], timed_in(name, target))])} |"


def _times(latency: Mapping[str, Any], name: str) -> list[str]:
    """Return a file's latency at each batch size."""
    times = latency["files"].get(name, {})
    return [_time(times.get(str(size))) for size in latency["batch_sizes"]]


PURPOSES = {
    "predict.py": "Prints what it predicts for image files.",
    "model_fp16.onnx": "For GPUs: weights and activations in float16; images and logits are float32.",
}
"""What a file is for, by its name, where that says it."""


def _purpose(name: str, architecture: Mapping[str, Any]) -> str:
    integers = "quantized" in architecture
    if name in PURPOSES:
        return PURPOSES[name]
    if name.endswith((".xml", ".bin", ".pte")):
        what = "ExecuTorch's program, for XNNPACK" if name.endswith(".pte") else "OpenVINO's IR, one file of two"
        return f"{what}; {'integers where it has them' if integers else 'float32'}."
    if name.endswith(".safetensors"):
        return "The weights; `kdpipe.load_student(path)` builds the network from its header."
    if name.endswith(".pt2"):
        needs = ", after `import torch.ao.quantization.fx._decomposed`" if integers else ""
        return f"`torch.export.load(path).module()`{needs}."
    if architecture.get("grid") == "symmetric":
        return "For TensorRT: signed INT8 with zero points of 0. It runs in onnxruntime too, slowly."
    return "For onnxruntime; " + ("integers where they are faster." if integers else "float32.")


def _time(pair: Mapping[str, float] | None) -> str:
    return "-" if pair is None else f"{pair['p50_ms']:.3f} ({pair['p95_ms']:.3f})"


def _escape(text: str) -> str:
    """Escape a name for Markdown: class names are untrusted input."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:80])
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", shown)


def _shortened(names: list[str]) -> str:
    names = [_escape(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

"""Predict images with model.onnx beside this file, model.xml or model.pte, as RUNTIME says: python predict.py IMAGE ...

It needs numpy, pillow and the library that RUNTIME names. In Python: `from predict import load_image, predict`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

RUNTIME = "onnxruntime"  # or "openvino", where model.xml is, or "executorch", where model.pte is


def open_model(folder: Path) -> tuple[Callable[[ArrayLike], ArrayLike], dict[str, str]]:
    """Return the network as a function of normalized images, and the metadata of its file."""
    if RUNTIME == "openvino":
        import openvino

        model = openvino.Core().read_model(folder / "model.xml")
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        facts = {key: model.get_rt_info(["kdpipe", key]).astype(str) for key in model.get_rt_info(["kdpipe"]).value}
        return lambda images: compiled(images)["logits"], facts
    if RUNTIME == "executorch":
        import torch
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(folder / "model.pte")
        size = program.metadata("forward").input_tensor_meta(0).sizes()[0]  # the most images of one call

        def run(images: ArrayLike) -> ArrayLike:
            whole = torch.from_numpy(np.asarray(images, np.float32))
            parts = [whole[start : start + size] for start in range(0, len(whole), size)]
            return np.concatenate([np.array(program.load_method("forward").execute([part])[0]) for part in parts])

        return run, json.loads(program.load_method("metadata").execute([])[0])
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    return lambda images: session.run(["logits"], {"images": images})[0], facts


RUN, METADATA = open_model(Path(__file__).parent)
FACTS = {key: json.loads(value) for key, value in METADATA.items()}
CHANNELS, HEIGHT, WIDTH = FACTS["image_shape"]
FIRST_HEIGHT, FIRST_WIDTH = FACTS.get("view_size", (HEIGHT, WIDTH))  # images were resized twice, if these differ
MEAN, STD = (np.float32(FACTS["normalization"][key]).reshape(-1, 1, 1) for key in ("mean", "std"))


def load_image(path: str | Path) -> NDArray[np.uint8]:
    """Return a file's pixels as the network was tested with them: uint8 [C, H, W]."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
    image = image.convert("L" if CHANNELS == 1 else "RGB")
    if image.size != (FIRST_WIDTH, FIRST_HEIGHT) or FACTS["test_crop"] != 1:
        side = min(image.size) * FACTS["test_crop"]
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box, size = (left, top, left + side, top + side), (FIRST_WIDTH, FIRST_HEIGHT)
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(HEIGHT, WIDTH, CHANNELS).transpose(2, 0, 1)


def predict(images: ArrayLike) -> NDArray[np.float32]:
    """Return logits [N, num_classes], or embeddings [N, D], of images, uint8 [N, C, H, W]."""
    return np.asarray(RUN((np.asarray(images) / np.float32(255) - MEAN) / STD))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        logits = predict([load_image(path)])[0]
        if FACTS.get("task") == "embedding":
            sys.stdout.write(f"{path}: {json.dumps([round(float(value), 4) for value in logits])}\n")
            continue
        values, least = logits, -np.inf  # of a regression
        if FACTS.get("task") == "multilabel":
            values, least = 1 / (1 + np.exp(-logits)), 0.5
        elif "task" not in FACTS:
            values = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            least = values.max()
        pairs = zip(FACTS["class_names"], values, strict=True)
        found = ", ".join(f"{name} ({value:.3f})" for name, value in pairs if value >= least)
        sys.stdout.write(f"{path}: {found}\n")

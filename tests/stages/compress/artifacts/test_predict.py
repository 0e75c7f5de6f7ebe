"""Tests of the predict.py that is handed over: it needs three packages, and sees what the network was tested on."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.device import DEVICE

from kdpipe.stages.compress.artifacts import write
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.executorch_program import export_executorch
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.openvino_ir import export_openvino
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.training.finalize import onnx_metadata

PACKAGES = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return a folder to import from that holds the three packages and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    site = Path(importlib.util.find_spec("numpy").origin).parents[1]
    for name in PACKAGES:
        if (site / name).exists():
            (folder / name).symlink_to(site / name)
    return folder


@pytest.mark.parametrize(("channels", "crop", "first"), [(3, 0.8, 17), (1, 1.0, 12)])
def test_predict_gives_the_networks_answers(tmp_path, bare, channels, crop, first):
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 6)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):  # of other sizes, so that cropping and the filter matter
                size = (20 + number, 31 - number, 3)
                image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
                exif = image.getexif()
                exif[0x0112] = 6  # rotated
                image.save(tmp_path / split / name / f"{number}.png", exif=exif)
    data = DataConfig(name=f"imagefolder:{tmp_path}", image_size=first, test_crop=crop, channels=channels)
    images = load_dataset(data, "test")
    config = ModelConfig(name="cnn", args={"width": 8})
    model = build_model(config, num_classes=2, in_channels=channels, image_size=(12, 12), seed=0).eval()
    network = ModelBundle(model, {}, Normalization((0.4,) * channels, (0.1,) * channels))
    test = Evaluation(ImageLoader(images, DEVICE, size=None if first == 12 else 12), network.normalize)
    handed_over = tmp_path / "handed over"
    handed_over.mkdir()
    export_onnx(
        model, torch.zeros(2, channels, 12, 12), handed_over / "model.onnx", metadata=onnx_metadata(network, test)
    )
    shutil.copy(Path(write.__file__).with_name("predict.py"), handed_over)
    files = sorted((tmp_path / "test").rglob("*.png"))
    code = f"import sys, runpy; sys.path.insert(0, {str(bare)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    script = f"import sys; sys.argv = sys.argv[1:]; {code}"
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, handed_over / "predict.py", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    with torch.no_grad():
        shares = torch.cat([model(batch) for batch, _ in test.batches()]).softmax(1)
    expected = [
        f"{path}: {images.class_names[int(row.argmax())]} ({float(row.max()):.3f})"
        for path, row in zip(files, shares, strict=True)
    ]
    assert ended.stdout.splitlines() == expected
    spec = importlib.util.spec_from_file_location("handed_over", handed_over / "predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):  # converted, it would be white
        predict.load_image(tmp_path / "deep.png")


@pytest.mark.parametrize("runtime", ["openvino", "executorch"])
def test_predict_runs_the_file_of_another_runtime(tmp_path, runtime):
    pytest.importorskip(runtime, reason=f"{runtime} is an extra: pip install 'kdpipe[{runtime}]'")
    config = ModelConfig(name="cnn", args={"width": 8})
    model = build_model(config, num_classes=2, in_channels=3, image_size=(12, 12), seed=0).eval()
    metadata = {
        "normalization": '{"mean":[0.4,0.4,0.4],"std":[0.1,0.1,0.1]}',
        "image_shape": "[3,12,12]",
        "test_crop": "1.0",
        "class_names": '["ant","bee"]',
    }
    export_onnx(model, torch.zeros(2, 3, 12, 12), tmp_path / "model.onnx", metadata=metadata)
    if runtime == "openvino":
        export_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
    else:
        export_executorch(model, torch.zeros(2, 3, 12, 12), tmp_path / "model.pte", metadata=metadata)
    (tmp_path / "model.onnx").unlink()
    script = Path(write.__file__).with_name("predict.py").read_text()
    (tmp_path / "predict.py").write_text(script.replace('"onnxruntime"', f'"{runtime}"', 1))
    spec = importlib.util.spec_from_file_location(f"handed_over_{runtime}", tmp_path / "predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 12, 12), dtype=np.uint8)
    with torch.no_grad():
        expected = model(Normalization((0.4,) * 3, (0.1,) * 3)(torch.from_numpy(images)))
    np.testing.assert_allclose(predict.predict(images), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert predict.FACTS["class_names"] == ["ant", "bee"]

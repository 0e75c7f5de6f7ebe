"""Test images on the page."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from kdpipe.pipeline.report.html.sections.samples import Sample, _file_names
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset


def test_photographs_have_their_file_names(tmp_path):
    for split in ("train", "test"):
        for shade, kind in ((10, "cat"), (20, "dog")):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (8, 8), (shade + number,) * 3).save(tmp_path / split / kind / f"{shade + number}.png")
    data = DataConfig(name=f"imagefolder:{tmp_path}", test_crop=0.9, image_size=8)
    found = load_dataset(data, "test")
    name = _file_names(SimpleNamespace(recipe=SimpleNamespace(data=data)))
    shown = [name(int(sample)) for sample in found.sample_ids]
    assert shown == [f"{found.read(number)[0, 0, 0]}.png" for number in range(4)]
    digits = SimpleNamespace(recipe=SimpleNamespace(data=DataConfig(name="digits")))
    assert _file_names(digits)(0) == ""


def test_photographs_are_small_jpegs():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 300, 400), np.uint8))
    sample = Sample(noise, "cat", "a.jpg", {})
    assert sample.url.startswith("data:image/jpeg;base64,") and len(sample.url) < 40_000
    assert Sample(noise[:, :32, :32], "cat", "a.png", {}).url.startswith("data:image/png;base64,")
    assert Sample(noise[:1], "cat", "a.jpg", {}).url == Sample(noise[:1], "cat", "a.jpg", {}).url

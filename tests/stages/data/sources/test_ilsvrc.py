"""ImageNet-1k as it is published gives the samples that it gives when its validation images are sorted by class."""

import numpy as np
import pytest
from PIL import Image

from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.errors import DataError

CLASSES = ("n01440764", "n02119789")
SOLUTION = [("ILSVRC2012_val_00000001", CLASSES[1]), ("ILSVRC2012_val_00000002", CLASSES[0])]


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "png")


def write_solution(root, rows=SOLUTION):
    lines = [f"{image},{label} 1 2 3 4 {label} 5 6 7 8 " for image, label in rows]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))


@pytest.fixture
def root(tmp_path):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for seed, name in enumerate(CLASSES):
        picture(data / "train" / name / f"{name}_1.JPEG", seed)
    for seed, (image, _) in enumerate(SOLUTION):
        picture(data / "val" / f"{image}.JPEG", 10 + seed)
    picture(data / "test" / "ILSVRC2012_test_00000001.JPEG", 20)
    write_solution(tmp_path)
    return tmp_path


def load(path, split="test"):
    return load_dataset(DataConfig(name=f"imagefolder:{path}"), split)


def test_flat_validation_images_are_those_sorted_by_class(root):
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    flat = [load(place) for place in (root, root / "ILSVRC", data)]
    train = load(root, "train")
    assert (train.class_names, train.labels.tolist()) == (CLASSES, [0, 1])
    assert any("the folders test are not used" in notice for notice in train.notices)
    for image, label in SOLUTION:
        (data / "val" / label).mkdir()
        (data / "val" / f"{image}.JPEG").rename(data / "val" / label / f"{image}.JPEG")
    by_class = load(data)
    for found in flat:
        assert found.sample_ids.tolist() == by_class.sample_ids.tolist()
        assert found.labels.tolist() == by_class.labels.tolist() == [0, 1]
        assert found.images.equal(by_class.images)


def test_labels_that_are_missing_or_wrong_are_refused(root):
    def refusal():
        with pytest.raises(DataError) as caught:
            load(root)
        return str(caught.value)

    write_solution(root, SOLUTION[:1])
    assert "LOC_val_solution.csv has no label of" in refusal() and "00000002.JPEG" in refusal()
    write_solution(root, [SOLUTION[0], (SOLUTION[1][0], "n00000000")])
    assert "the class 'n00000000', which is missing from the train split" in refusal()
    (root / "LOC_val_solution.csv").write_text("a,b\n1,2")
    assert "expected the columns ImageId and PredictionString" in refusal()
    (root / "LOC_val_solution.csv").unlink()
    assert "ILSVRC2012_validation_ground_truth.txt numbers classes in another order" in refusal()

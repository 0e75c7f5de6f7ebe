"""The same images in folders, tables, tar files, LMDB and Hugging Face data sets give the same targets."""

import csv
import io
import tarfile

import datasets
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here
from torch import nn

import kdpipe as kd
from kdpipe.stages.data.image_set import pixel_checksums

CLASSES = ("cat", "dog")
KINDS = ("imagefolder", "table", "webdataset", "lmdb", "hf_dataset")
VIEWS = kd.Views(2, [{"name": "RandomResizedCrop", "size": 8}], engine="transforms")

RECIPE = """
# Command: kdpipe run shards.toml. Hardware: any. Time: seconds. Expect: a done run.
name = "shards"
device = "DEVICE"
num_threads = 1
compress = { steps = [] }
data = { name = "webdataset:FOLDER/webdataset", cache_bytes = 0, num_workers = 0, image_size = 16 }
views = { num_views = 2, operations = [{ name = "RandomHorizontalFlip" }] }
teacher = { model = { name = "cnn", args = { width = 4 } }, train = { epochs = 2, batch_size = 8 } }

[student]
model = { name = "cnn", args = { width = 4 } }
train = { epochs = 2, batch_size = 8 }
seeds = [0]

[[distill]]
loss = "kd"
""".replace("DEVICE", str(DEVICE))


def samples(split):
    """Yield the path, bytes and class of each image of a split."""
    for label, name in enumerate(CLASSES):
        for number in range(8 if split == "train" else 2):
            generator = np.random.default_rng([label, number, split == "train"])
            noise = generator.integers(0, 100, (16 + 4 * number, 20, 3)) + 100 * label
            file = io.BytesIO()
            Image.fromarray(noise.astype(np.uint8)).save(file, "png")
            yield f"{name}/{number}.png", file.getvalue(), name


def write(place):
    """Write all formats below a folder."""
    table, hub = [("path", "label", "split")], {}
    for split in ("train", "test"):
        (place / "lmdb").mkdir(exist_ok=True)
        (place / "webdataset").mkdir(exist_ok=True)
        database = lmdb.open(str(place / "lmdb" / f"{split}.lmdb"), map_size=2**24)
        hub[split] = {"image": [], "label": []}
        with tarfile.open(place / "webdataset" / f"x-{split}-0.tar", "w") as tar, database.begin(write=True) as values:
            for path, content, name in samples(split):
                file = place / "imagefolder" / split / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                for member, data in ((path, content), (path.replace(".png", ".cls"), name.encode())):
                    values.put(member.encode(), data)
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                table.append((f"imagefolder/{split}/{path}", name, split))
                hub[split]["image"].append({"bytes": content, "path": None})
                hub[split]["label"].append(CLASSES.index(name))
        database.close()
    with (place / "table").open("w", newline="") as opened:
        csv.writer(opened).writerows(table)
    (place / "table").rename(place / "table.csv")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    splits = {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in hub.items()}
    datasets.DatasetDict(splits).save_to_disk(place / "hf_dataset")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write(folder)
        yield folder


def cached(place, kind):
    """Return the training images of a format, and the logits that a network of fixed weights gives their views."""
    path = place / ("table.csv" if kind == "table" else kind)
    train, _ = kd.load_dataset(f"{kind}:{path}", cache_bytes=0, num_workers=0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    options = {"normalize": (0.5, 0.5), "device": DEVICE, "progress": False, "num_workers": 0}
    store = kd.cache_teacher(network, train, place / f"{kind}.zarr", views=VIEWS, **options)
    order = np.argsort(pixel_checksums(train))
    ids = train.sample_ids.numpy()[order]
    return train, order, [store.gather("logits", view, ids) for view in range(2)]


def test_all_formats_hold_the_same_samples_and_targets(place):
    folder, rows, logits = cached(place, "imagefolder")
    for kind in KINDS[1:]:
        found, order, others = cached(place, kind)
        assert found.class_names == CLASSES and not found.in_memory
        assert pixel_checksums(found)[order].tolist() == pixel_checksums(folder)[rows].tolist()
        assert found.labels[order].tolist() == folder.labels[rows].tolist()
        if kind in ("webdataset", "lmdb"):  # the ids are hashes of the same paths, so that views are the same, too
            assert found.sample_ids[order].tolist() == folder.sample_ids[rows].tolist()
            assert all(map(np.array_equal, others, logits))


def test_tar_files_go_through_the_command_line(place, without_onnx):
    (place / "shards.toml").write_text(RECIPE.replace("FOLDER", str(place)))
    for command in ("train-teacher", "cache-teacher", "train-student"):
        result = kdpipe_here(command, place / "shards.toml", "--run", place / "run", "--json")
        assert result.exit_code == 0, result.stderr
    assert "distilled" in result.stdout

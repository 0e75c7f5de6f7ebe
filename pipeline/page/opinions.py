"""What teacher and students say of some pictures: training samples in their views, and telling test images.

Only data that lies on this machine is read, no module of a stranger's is run, and the teacher's words come from the
stores: the students alone are asked, on the CPU, for no longer than a report may take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.page.markup import LeftOutError
from pipeline.page.read import PageRun
from pipeline.recipe.load import read_run_recipe
from pipeline.run import Run
from pipeline.steps import run_views
from stages.evaluate import BATCH_SIZE
from stages.job_folder import JobFolder, read_json
from stages.network import Network
from stages.pictures import Request
from stages.rebuild import rebuild
from stages.show_views import ShownViews
from stages.watch import Watch
from store import is_url

Said = list[tuple[str, float]]
"""The likeliest classes with their probabilities, the likeliest first."""

NUM_TOP, NUM_SAMPLES, NUM_LOOKED_AT, NUM_VIEWS, NUM_EACH = 3, 3, 32, 4, 4

LEAST_ASKED, MOST_ASKED, MOST_MACS = 24, 1000, 4e10
"""Of how many test images the students are asked, within the multiply-accumulates that this may take in all."""

MOST_FILES = 100_000
"""A folder of more pictures is left alone: each of them would be looked at."""


@dataclass(frozen=True)
class Shown:
    """A picture, uint8 [C, H, W], what it is, and who says what of it. about: where it comes from."""

    image: Tensor
    label: str
    about: str
    opinions: Mapping[str, Said]


@dataclass(frozen=True)
class Asked:
    """What is known of the first test images: labels int64 [N], and by network the probabilities float32 [N, C]."""

    labels: Tensor
    said: Mapping[str, Tensor]

    def right(self, name: str) -> Tensor:
        return self.said[name].argmax(1) == self.labels


def open_walk(run: PageRun) -> Run:
    """The run's recipe, to read its data and stores. Raises LeftOutError where that would run a stranger's code."""
    recipe = read_run_recipe(run.path)
    if recipe is None or any("python:" in str(one) for one in (recipe.data.name, recipe.views.transform)):
        raise LeftOutError("The pictures of this run come from a module of Python, and a report runs none.")
    data = replace(recipe.data, download=False, num_workers=0)
    walk = Run(replace(recipe, device="cpu", data=data), run.path, Watch())
    if any(map(is_url, walk.stores)):
        raise LeftOutError("The stores of this run lie on another machine, and a report fetches nothing.")
    if recipe.data.name.startswith("imagefolder:") and _num_samples(run) > MOST_FILES:
        raise LeftOutError(f"A report does not look through more than {MOST_FILES:,} files of pictures.")
    return walk


def _num_samples(run: PageRun) -> int:
    """Of the training set, as the first job has it."""
    made_from = read_json(run.networks[0].jobs[0].folder / "job.json") or {}
    count = made_from.get("data", {}).get("num_samples", 0)
    return count if isinstance(count, int) else 0


def students_of(run: PageRun) -> dict[str, Network]:
    """The first finished student of each of the main kinds, by its name."""
    found = {}
    for one in run.main:
        if one.kind != "teacher" and one.done:
            found[one.name] = rebuild(JobFolder(one.done[0].folder).model)
    return found


def views_shown(walk: Run, students: Mapping[str, Network]) -> list[list[Shown]]:
    """Training samples, each in its first views: the first, and of some more those that puzzle the teacher most."""
    shown, _ = run_views(walk, NUM_LOOKED_AT, NUM_VIEWS)
    names = walk.setup.train_set.class_names
    found: list[list[Shown]] = []
    for row in _least_sure(shown):
        label, number = shown.labels[row], shown.sample_ids[row]
        said = {name: ask(student, shown.images[row]) for name, student in students.items()}
        found.append([])
        for view, image in enumerate(shown.images[row]):
            opinions = {"teacher": shown.top[row][view]} if shown.top[row] else {}
            opinions |= {name: likeliest(one[view], names) for name, one in said.items()}
            partner = shown.partners[row][view]
            mixed = f", with {100 * partner[1]:.0f} % {partner[0]}" if partner else ""
            found[-1].append(Shown(image, label, f"sample {number}, view {view}{mixed}", opinions))
    return found


def _least_sure(shown: ShownViews) -> list[int]:
    """The first row, and those whose views the teacher's likeliest classes get the smallest shares of."""
    sure = [sum(view[0][1] for view in views if view) for views in shown.top]
    return [0, *sorted(range(1, len(sure)), key=lambda row: (sure[row], row))[: NUM_SAMPLES - 1]]


def ask_test(walk: Run, students: Mapping[str, Network], num_macs: int) -> Asked:
    """Ask the students of the first test images, as many as `num_macs` for each allow, and the stores of the same."""
    test_set = walk.setup.test_set
    most = int(min(test_set.num_samples, MOST_ASKED, max(MOST_MACS / max(num_macs, 1), LEAST_ASKED)))
    at = torch.arange(most)
    seen = [walk.setup.test_pictures.one(Request(some)).images for some in torch.split(at, BATCH_SIZE)]
    said = {name: torch.cat([ask(student, images) for images in seen]) for name, student in students.items()}
    teacher = walk.setup.ask_teacher()
    if teacher is not None and not teacher[:most].isnan().any():
        said = {"teacher": teacher[:most].softmax(1), **said}
    return Asked(test_set.labels[:most], said)


def telling(walk: Run, asked: Asked) -> list[tuple[str, list[Shown]]]:
    """Test images from which something can be learnt, by what it is."""
    groups: list[tuple[str, Tensor]] = []
    names = set(asked.said)
    if {"student alone", "student distilled"} <= names:
        own, taught = asked.right("student alone"), asked.right("student distilled")
        groups.append(("The student is wrong alone, and right when taught", taught & ~own))
        groups.append(("The student is right alone, and wrong when taught", own & ~taught))
    picked = [(title, mask.nonzero()[:NUM_EACH, 0]) for title, mask in groups]
    if "teacher" in names:
        sure = asked.said["teacher"].amax(1)
        picked.append(("The teacher is least sure", sure.argsort(stable=True)[:NUM_EACH]))
    return [(title, [_test_image(walk, asked, int(at)) for at in chosen]) for title, chosen in picked if len(chosen)]


def _test_image(walk: Run, asked: Asked, at: int) -> Shown:
    test_set = walk.setup.test_set
    image = walk.setup.test_pictures.one(Request(torch.tensor([at]))).images[0]
    opinions = {name: likeliest(said[at], test_set.class_names) for name, said in asked.said.items()}
    label = test_set.class_names[int(asked.labels[at])]
    return Shown(image, label, f"test image {int(test_set.sample_ids[at])}", opinions)


@torch.no_grad()
def ask(network: Network, images: Tensor) -> Tensor:
    """Probabilities float32 [B, C] of images uint8 [B, C, H, W]."""
    said: Tensor = network.model(network.normalise(images)).float().softmax(1)
    return said


def likeliest(said: Tensor, names: Sequence[str]) -> Said:
    """The first classes of probabilities [C]."""
    shares, which = said.topk(min(NUM_TOP, len(said)))
    return [(names[number], share) for number, share in zip(which.tolist(), shares.tolist(), strict=True)]

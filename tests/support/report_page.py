"""Run folders with made results, and their pages as parsed HTML."""

import json
import re
from html.parser import HTMLParser

from kdpipe.pipeline.report.html.write import write_page

VOID = {"meta", "br", "img", "hr", "input"}


class Parsed(HTMLParser):
    """A parsed page: elements closed in order, attributes, texts, headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.headings, self.tags = [], [], [], [], set()
        self.tables, self.code = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *one) for one in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([[]])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.code.append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *one) for one in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "pre" in self.open:
            self.code[-1] += data
        elif "caption" in self.open:
            self.tables[-1][0].append(data)
        elif self.open and {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))

    def table(self, caption):
        """Return the rows of a table, each by its headers."""
        _, headers, *rows = next(rows for rows in self.tables if "".join(rows[0]).strip().startswith(caption))
        return [dict(zip(headers, row, strict=True)) for row in rows]

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def examined(right=0.8, names=("cat", "dog", "eel"), **more):
    """Return an evaluation as stages.examine writes it; of fifteen bins the last two are filled."""
    empty = {"num_samples": 0, "confidence": None, "accuracy": None}
    some = {"num_samples": 10, "confidence": 0.9, "accuracy": 0.5}
    kept = {
        "top1": right,
        "top5": None,
        "cross_entropy": 1.0,
        "ece": 0.125,
        "agreement": None,
        "teacher_kl": None,
        "per_class": [{"name": name, "accuracy": right, "num_samples": 1000} for name in names],
        "bins": [empty] * 13 + [some, {"num_samples": 30, "confidence": 0.97, "accuracy": 0.99}],
        "confusions": [[0, 1, 3], [1, 2, 1]],
    }
    return {name: value for name, value in (kept | more).items() if value is not ...}


def leave_job(folder, accuracy, found, losses=("hard_labels",)):
    folder.mkdir(parents=True)
    result = {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "num_parameters": 10,
        "onnx_bytes": 2048,
        "onnx_agreement": 1.0,
        "identity": {"weights_sha256": "ab" * 32},
        "wall_s": 1.0,
    }
    if found is not None:
        result["examined"] = found
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        json.dumps({"epoch": epoch, "accuracy": accuracy * (epoch + 1) / 3, "losses": dict.fromkeys(losses, 1.0)})
        for epoch in range(3)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def made_run(folder, name="made", seeds=(0, 1), **kept):
    """Make a run of three networks with accuracies 90 %, alone 70 and 72 %, distilled 80 and 82 %."""
    recipe = {
        "name": name,
        "data": {"name": "digits"},
        "views": {"num_views": 4, "operations": [{"name": "RandomCrop"}]},
        "teacher": {"model": {"name": "cnn", "args": {"width": 24}}},
        "student": {"seeds": list(seeds), "model": {"name": "cnn", "args": {"width": 6}}, "hard_label_weight": 0.1},
        "distill": [{"loss": "kd", "weight": 0.9, "temperature": 4.0}, {"loss": "hint", "layers": [["a", "b"]]}],
        "compress": {"steps": []},
        "cache": {},
    }
    leave_job(folder / "teacher", 0.9, examined(0.9, **kept))
    for seed in seeds:
        leave_job(folder / f"students/alone-seed{seed}", 0.7 + 0.02 * seed, examined(0.7, **kept))
        leave_job(folder / f"students/distilled-seed{seed}", 0.8 + 0.02 * seed, examined(0.8, **kept))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def page_of(*runs, file=None):
    """Return the page's text, parsed, and the messages meanwhile."""
    messages, file = [], file or runs[0].parent / "page.html"
    write_page(runs, file, messages.append)
    text = file.read_text()
    return text, Parsed(text), messages

"""The hub is asked once whether it answers; where it does not, libraries use their cache, and the message is short."""

import logging
from types import SimpleNamespace

import pytest

from kdpipe.stages.errors import DataError, ModelError
from kdpipe.stages.runtime.hub import _answers, hub_cause, hub_or_cache

client = pytest.importorskip("huggingface_hub")
SHAPE = {"num_classes": 1000, "in_channels": 3, "image_size": (32, 32), "seed": 0}


@pytest.fixture
def attempts(monkeypatch, tmp_path):
    """The addresses that were asked by a machine without a network."""
    found: list[str] = []

    def head(url, **_):
        found.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", False)
    _answers.clear()
    yield found
    _answers.clear()


def test_all_libraries_share_one_attempt(attempts, tmp_path):
    pytest.importorskip("timm"), pytest.importorskip("transformers"), pytest.importorskip("datasets")
    from kdpipe.stages.data.config import DataConfig
    from kdpipe.stages.data.load import load_dataset
    from kdpipe.stages.models.build import ModelConfig, build_model

    reason = r"\(https://huggingface.co cannot be reached: ConnectionError: no route\)"
    for name in ("timm:resnet18", "hf:nobody/nothing"):
        with pytest.raises(ModelError, match=rf"of {name} cannot be loaded {reason}: fetch "):
            build_model(ModelConfig(name=name, weights="published"), **SHAPE)
    with pytest.raises(DataError, match=rf"hub or its cache {reason}: check the name"):
        load_dataset(DataConfig(name="hf_dataset:nobody/nothing", root=str(tmp_path)), "train")
    assert attempts == ["https://huggingface.co"]


def test_the_cache_alone_is_used_where_the_hub_is_not_asked(attempts, monkeypatch):
    with hub_or_cache() as why:
        assert "no route" in why and client.constants.HF_HUB_OFFLINE
    with hub_or_cache("download is false") as why:
        assert why == "download is false" and client.constants.HF_HUB_OFFLINE
    with hub_or_cache(local=True) as why:
        assert not why and not client.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    _answers.clear()
    with hub_or_cache() as why:
        assert why == "HF_HUB_OFFLINE is set"
    assert len(attempts) == 1 and client.constants.HF_HUB_OFFLINE


def test_attempts_are_not_printed_and_advice_is_left_out(attempts):
    with hub_or_cache():
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    error = OSError("We could not connect to 'https://x.co'. Check your connection. See https://x.co/help.")
    assert hub_cause(error) == "OSError: We could not connect to 'https://x.co'"
    assert hub_cause(ValueError("damaged"), "HF_HUB_OFFLINE is set") == "ValueError: damaged"

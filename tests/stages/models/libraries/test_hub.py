"""What the hub's client says is one sentence."""

import logging

import pytest

from kdpipe.stages.models.libraries.hub import hub_cause, without_messages

pytest.importorskip("huggingface_hub")


def test_the_advice_of_the_library_is_left_out():
    error = OSError("We could not connect to 'https://x.co'. Check your connection. See https://x.co/help.")
    assert hub_cause(error) == "OSError: We could not connect to 'https://x.co'"


def test_attempts_are_not_printed():
    without_messages()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)

"""Passwords and queries of URLs are left out of every text."""

import pytest
from typer.testing import CliRunner

from kdpipe.pipeline.main import app
from kdpipe.store import FingerprintMismatch, KdpipeError
from kdpipe.store.redact import is_redacted, redacted, redacted_json, redacted_options

URL = "https://me:hunter2@h/x?sig=hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:word@bucket/x?X-Amz-Signature=1", "s3://...@bucket/x?..."),
        ("https://hf_token@host/a#b", "https://...@host/a#b"),
        ("see https://me:w@h:8080/x?sig=1: HTTP 403", "see https://...@h:8080/x?...: HTTP 403"),
        ("https://me:wo?rd/x@host/y", "https://...@host/y"),
        ("""https://me:pa ss'"@host/y""", "https://...@host/y"),
        ("['https://a:b@c/x?y', 'https://d/e']", "['https://...@c/x?...', 'https://d/e']"),
        ("--set student.stores=https://me:half-of-a-pass", "--set student.stores=https://...@"),
        ("/runs/https:/me:word@host/x", "/runs/https:/...@host/x"),
        *[
            (text, text)
            for text in (
                "https://[::1]:80/x",
                "did you mean https://host:80/a@b?",
                "no host in https://h: give one",
                "file:///a@b/c",
                "imagefolder:/a@b/c?d",
                "https://...@host/x?...",
            )
        ],
    ],
)
def test_a_url_keeps_only_what_is_public(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_json_and_errors_are_redacted():
    secret = {"stores": ("https://a:b@h/x", 1), "https://a:b@h": [None]}
    assert redacted_json(secret) == {"stores": ("https://...@h/x", 1), "https://...@h": [None]}
    assert str(KdpipeError("no https://a:b@h/x?c=d")) == "no https://...@h/x?..."
    error = FingerprintMismatch("the run", [("stores", "https://a:b@h", "s3://k:w@b")], "Stop.")
    assert error.differences == (("stores", "https://...@h", "s3://...@b"),)


def test_options_that_sound_like_secrets_are_hidden():
    options = [{"name": "wandb", "api_key": "abc", "tokens": 3}, "--set", "callbacks.0.api_key=abc", "seed=1"]
    shown = [{"name": "wandb", "api_key": "...", "tokens": 3}, "--set", "callbacks.0.api_key=...", "seed=1"]
    assert redacted_options(options) == shown


@pytest.mark.parametrize("arguments", [["store", "info", "a", URL], [URL], ["store", "info", URL], ["report", URL]])
def test_usage_errors_quote_no_secrets(arguments):
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code != 0
    assert "...@h/x" in ended.output
    assert "hunter2" not in ended.output


def test_a_redacted_address_is_known():
    assert [is_redacted(url) for url in ("https://...@h/x", "https://h/x?...", "https://h/x")] == [True, True, False]

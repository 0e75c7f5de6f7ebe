"""Messages of mismatches stay a few lines, whatever differs."""

from kdpipe.store.errors import FingerprintMismatch, differences


def test_a_mismatch_shows_a_few_short_differences():
    stored = {**{f"key{number}": 1 for number in range(9)}, "classes": [f"class {number}" for number in range(1000)]}
    wanted = {**{f"key{number}": 2 for number in range(9)}, "classes": ["cat"], "sha256": "a" * 64}
    found = differences(stored, wanted)
    error = FingerprintMismatch("the store x", found, "Use another store.")
    assert len(error.differences) == 11
    assert len(str(error)) < 500
    assert "classes: stored 1000 values, ['class 0'," in str(error)
    assert "and 6 more differences. Use another store." in str(error)
    assert "sha256: stored None, wanted 'aaaaaaaaaaaa...'" in str(FingerprintMismatch("x", found[-1:], ""))


def test_settings_are_named_before_what_follows_from_them():
    """Digests follow from settings, and a loss's keys from its name; identities are not printed."""
    stored = {
        "losses": [{"alpha": None, "loss": "kd"}],
        "views": {"probes_sha256": "a", "seed": 0},
        "stores": [{"a": "b" * 99}],
    }
    wanted = {"losses": [{"alpha": 1.0, "loss": "dkd"}], "views": {"sha256": "b", "seed": 3}, "stores": []}
    text = str(FingerprintMismatch("the job x", differences(stored, wanted), "Use another."))
    assert text == (
        "the job x was made from other inputs - losses.0.loss: stored 'kd', wanted 'dkd'; stores: stored 1 entries, "
        "wanted []; views.seed: stored 0, wanted 3; losses.0.alpha: stored None, wanted 1.0. Use another."
    )

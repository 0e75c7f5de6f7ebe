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
    assert "and 7 more differences. Use another store." in str(error)
    assert "sha256: stored None, wanted 'aaaaaaaaaaaa...'" in str(FingerprintMismatch("x", found[-1:], ""))

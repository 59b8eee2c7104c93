"""What all tests share."""

import pytest

from benchtop import profile


@pytest.fixture(autouse=True)
def no_profile_lasts():
    """A test that runs a chapter's set-up chooses a profile; it must not decide over the tests that follow."""
    yield
    profile._active = None

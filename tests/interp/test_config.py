"""Tables of tile sizes find an entry for every architecture, also for those made after them."""

import pytest

from encfast.kernels import _config

TABLE = {"sm_80": 1, "sm_86": 2, "sm_90": 3, "gfx90a": 4, "gfx942": 5, "interpreter": 6}


@pytest.mark.parametrize(
    ("arch", "entry"),
    [("sm_80", 1), ("sm_89", 2), ("sm_90", 3), ("sm_120", 3), ("gfx942", 5), ("gfx950", 5)],
)
def test_nearest_is_the_newest_older_architecture(arch, entry):
    assert _config.nearest(TABLE, arch) == entry


def test_nothing_older_is_an_error_that_lists_the_table():
    with pytest.raises(ValueError, match=r"no configuration for sm_75.*sm_80"):
        _config.nearest(TABLE, "sm_75")


def test_target_of_the_interpreter():
    assert _config.target() == "interpreter"
    assert _config.nearest(TABLE, _config.target()) == 6

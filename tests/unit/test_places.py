"""Places as text: several disks, and paths with commas in unlucky positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.places import absolute_store, disks_of
from ckptd.plugin import TierFactory
from ckptd_plugins.storage_local import ckptd_tiers

_NAME = st.text("ab.-_ é%#?", min_size=1, max_size=4).filter(lambda name: name.strip() and name not in (".", ".."))


@pytest.mark.parametrize(
    ("store", "disks"),
    [
        ("/runs", ("/runs",)),
        ("/nvme0/runs,/nvme1/runs", ("/nvme0/runs", "/nvme1/runs")),
        ("a,b,c", ("a", "b", "c")),
        ("~/a,/b", ("~/a", "/b")),
        ("s3://bucket/a,b", ("s3://bucket/a,b",)),
        ("file:///a,/b", ("file:///a,/b",)),
    ],
)
def test_disks(store: str, disks: tuple[str, ...]) -> None:
    """A comma parts disks, but not URLs."""
    assert disks_of(store) == disks


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("/a,", "one of them has no name"),
        (",", "one of them has no name"),
        ("/a, ,/b", "one of them has no name"),
        ("/a,/a", "/a is named twice"),
        ("/a,/b,/c/../a/", "/a is named twice"),
        ("a,./a", "a is named twice"),
        ("/a,/a/b", "/a/b lies in /a"),
        ("/data/lr=1,bs=2", "not all of them begin at the root"),
    ],
)
def test_what_can_not_be_meant(store: str, says: str) -> None:
    """Disks that are none, or the same, are refused with a hint."""
    with pytest.raises(ConfigError) as caught:
        disks_of(store)
    assert says in caught.value.message
    assert caught.value.hint


def test_absolute() -> None:
    """Each disk is seen from the folder; what is the same only then is refused then."""
    assert absolute_store("a,../b", "/home/me") == "/home/me/a,/home/b"
    assert absolute_store("/a,/b/../c", "/home/me") == "/a,/c"
    with pytest.raises(ConfigError, match="lies in"):
        absolute_store(".,a", "/home/me")
    with pytest.raises(ConfigError, match="is named twice"):
        absolute_store("../me,.", "/home/me")


def test_a_folder_with_a_comma(tmp_path: Path) -> None:
    """A store below such a folder is one disk, named by a URL; several disks have to be named from the root on."""
    here = tmp_path / "lr=0.1,bs=2"
    place = absolute_store("runs", here)
    assert disks_of(place) == (place,)
    assert absolute_store(place, "/") == place
    assert _opened(place) == str(here / "runs")
    with pytest.raises(ConfigError, match="has a comma in its name"):
        absolute_store("a,b", here)
    assert absolute_store("/a,/b", here) == "/a,/b"


@given(st.lists(_NAME, min_size=1, max_size=3, unique=True), st.lists(st.text("ab, %é#", min_size=1, max_size=4)))
def test_a_path_means_one_thing(names: list[str], folder: list[str]) -> None:
    """A store that was made absolute stays as it is, and its disks are the folders that were named."""
    here = "/" + "/".join(part.strip() or "x" for part in folder)
    try:
        place = absolute_store(",".join(names), here)
    except ConfigError:
        assert len(names) > 1
        return
    assert absolute_store(place, "/elsewhere") == place
    wanted = [str(Path(here, name)) for name in names]
    if len(names) == 1:
        assert _opened(place) == wanted[0]
    else:
        assert list(disks_of(place)) == wanted


def _opened(place: str) -> str:
    (factory,) = ckptd_tiers()
    assert isinstance(factory, TierFactory)
    return factory.open(place, {}).url

"""Tiers as flags and TOML files name them: what can't be meant is refused, everything else means one thing."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.store_config import StoreConfig, absolute_stores, read_stores

_TEXT = st.text(min_size=1, max_size=8)


def test_a_place_alone() -> None:
    """A path or URL is a tier with everything at its default, but for what the job says of all its tiers."""
    assert read_stores("/runs", 3) == (StoreConfig("/runs"),)
    assert read_stores(["/runs", "s3://bucket/runs"], 7) == (
        StoreConfig("/runs", keep_last=7),
        StoreConfig("s3://bucket/runs", keep_last=7),
    )


def test_a_table() -> None:
    """What people write with its unit is read, and what is nobody's setting here goes to the plugin."""
    written = tomllib.loads(
        """
        [[store]]
        url = "/nvme/runs"
        keep_last = 2

        [[store]]
        url = "s3://bucket/runs"
        keep_every = "1h"
        keep_best = "loss:min:3"
        keep_tagged = false
        max = "2TB"
        grace = "1h"
        garbage_after = "3d"
        every = "10m"
        backlog = 4
        upload_max = "200MB/s"
        region = "eu-west-1"
        options = {profile = "train"}
        """
    )
    assert read_stores(written["store"], 3) == (
        StoreConfig("/nvme/runs", keep_last=2),
        StoreConfig(
            "s3://bucket/runs",
            keep_every_s=3600.0,
            keep_best="loss:min:3",
            keep_tagged=False,
            max_bytes=2 * 10**12,
            grace_s=3600.0,
            garbage_after_s=3 * 86400.0,
            every_s=600.0,
            backlog=4,
            upload_max_bytes_per_s=200_000_000,
            options={"region": "eu-west-1", "profile": "train"},
        ),
    )


def test_every_so_many_steps() -> None:
    """`keep_every` counts steps when it says so."""
    (store,) = read_stores({"url": "/runs", "keep_every": "1000 steps"}, 3)
    assert (store.keep_every_steps, store.keep_every_s) == (1000, 0.0)


def test_the_best_in_its_parts() -> None:
    """`keep_best` is a metric, a direction and a count."""
    assert StoreConfig("/runs", keep_best="val/loss:min:3").best == ("val/loss", "min", 3)
    assert StoreConfig("/runs").best is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "no store is named"),
        ([], "no store is named"),
        ([7], "7 names no store"),
        ({"keep_last": 3}, "names no store"),
        (["/runs", "/runs"], "store /runs is named twice"),
        ({"url": "/runs", "keep_last": 0}, "keep_last is 0"),
        ({"url": "/runs", "keep_last": "3"}, "keep_last of a store must be a whole number, not '3'"),
        ({"url": "/runs", "keep_last": True}, "keep_last of a store must be a whole number, not True"),
        ({"url": "/runs", "keep_every": "often"}, "keep_every 'often' is no duration"),
        ({"url": "/runs", "keep_every": "0 steps"}, "keep_every '0 steps' is no duration"),
        ({"url": "/runs", "keep_best": "loss"}, "keep_best is 'loss'"),
        ({"url": "/runs", "keep_best": "loss:low:3"}, "keep_best is 'loss:low:3'"),
        ({"url": "/runs", "keep_best": "loss:min:0"}, "keep_best is 'loss:min:0'"),
        ({"url": "/runs", "keep_tagged": 1}, "keep_tagged of a store must be true or false, not 1"),
        ({"url": "/runs", "max": "much"}, "max 'much' is no size"),
        ({"url": "/runs", "every_s": float("nan")}, "every_s of a store must be a number of seconds"),
        ({"url": "/runs", "backlog": 0}, "backlog is 0"),
        ({"url": "/runs", "options": 5}, "options of a store must be a table"),
        ("/a,", "one of them has no name"),
        (["/a,/b", "/b"], "store /b is named twice"),
        ({"url": "/a", "disks": ["/b"]}, "a store has both url and disks"),
        ({"disks": []}, "disks of a store must be a list of folders, not []"),
        ({"disks": "/a"}, "disks of a store must be a list of folders, not '/a'"),
        ({"disks": ["/a", 5]}, "disks of a store must be a list of folders"),
        ({"disks": ["/a", "s3://b"]}, "disk 's3://b' of a store is a URL"),
        ({"disks": ["/a,b", "/c"]}, "disk '/a,b' has a comma in its name"),
        ({"disks": ["/a", "/a/"]}, "/a is named twice"),
    ],
)
def test_what_can_not_be_meant_is_refused(value: Any, says: str) -> None:
    """Each setting that can't be used is a `ConfigError` with its name, its value and a hint."""
    with pytest.raises(ConfigError) as caught:
        read_stores(value, 3)
    assert says in caught.value.message
    assert caught.value.hint


@given(
    st.builds(
        StoreConfig,
        url=_TEXT.filter(lambda text: "," not in text),
        keep_last=st.integers(1, 100),
        keep_every_s=st.floats(0, 1e6),
        keep_every_steps=st.integers(0, 10**9),
        keep_best=st.sampled_from(["", "loss:min:3", "accuracy:max:1"]),
        keep_tagged=st.booleans(),
        max_bytes=st.integers(0, 2**60),
        every_s=st.floats(0, 1e6),
        backlog=st.integers(1, 9),
        upload_max_bytes_per_s=st.integers(0, 2**40),
        scrub_s=st.none() | st.floats(0, 1e6),
        scrub_max_bytes_per_s=st.integers(0, 2**40),
        options=st.dictionaries(_TEXT, _TEXT, max_size=2),
    )
)
def test_round_trip(store: StoreConfig) -> None:
    """A tier that crosses the socket and the journal as JSON is the same, whatever the job's own default."""
    assert read_stores(json.loads(json.dumps([store.to_json()])), 50) == (store,)


@pytest.mark.parametrize(
    ("written", "scrub_s"), [({}, None), ({"scrub": "0"}, 0.0), ({"scrub": 0}, 0.0), ({"scrub": "12h"}, 43200.0)]
)
def test_scrub(written: dict[str, object], scrub_s: float | None) -> None:
    """How often a copy is read again is a duration, nothing at all for "0", and the tier's own choice when not said."""
    (store,) = read_stores({"url": "/a", "scrub_max": "5MB/s", **written}, 3)
    assert (store.scrub_s, store.scrub_max_bytes_per_s) == (scrub_s, 5_000_000)


def test_absolute() -> None:
    """Paths are seen from the folder that is given, URLs stay as they are."""
    stores = read_stores(["runs", "/a/../b", "s3://bucket/x"], 3)
    assert [store.url for store in absolute_stores(stores, Path("/home/me"))] == [
        "/home/me/runs",
        "/b",
        "s3://bucket/x",
    ]


def test_several_disks() -> None:
    """`disks` is another way to write a place with commas, and every disk is seen from the folder."""
    (store,) = read_stores({"disks": ["a", "d"], "keep_last": 2}, 3)
    assert store == StoreConfig("a,d", keep_last=2)
    (absolute,) = absolute_stores((store,), Path("/home/me"))
    assert absolute.url == "/home/me/a,/home/me/d"
    assert read_stores([absolute.to_json()], 3) == (absolute,)


def test_places_that_are_the_same_from_everywhere() -> None:
    """Two tiers that turn out to have a disk in common are refused."""
    stores = read_stores(["a,b", "./a"], 3)
    with pytest.raises(ConfigError, match="store /home/me/a is named twice"):
        absolute_stores(stores, Path("/home/me"))

"""URLs and options of an S3 tier, without a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest

from ckptd.errors import ConfigError
from ckptd_plugins import s3
from ckptd_plugins.storage_s3.options import Place, S3Options

SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    ("url", "bucket", "prefix", "shown"),
    [
        ("s3://bucket", "bucket", "", "s3://bucket"),
        ("s3://bucket/", "bucket", "", "s3://bucket"),
        ("s3://bucket/runs", "bucket", "runs/", "s3://bucket/runs"),
        ("s3://my.bucket-1/a/b c/", "my.bucket-1", "a/b c/", "s3://my.bucket-1/a/b c"),
    ],
)
def test_a_url_is_a_bucket_and_a_prefix(url: str, bucket: str, prefix: str, shown: str) -> None:
    """What follows the bucket is a prefix, with or without a slash at its end."""
    place = Place.of(url)
    assert (place.bucket, place.prefix, place.url) == (bucket, prefix, shown)
    assert place.show("job/x") == f"s3://{bucket}/{prefix}job/x"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/runs",
        f"s3://{SECRET}@bucket",
        f"s3://bucket/runs?secret={SECRET}",
        f"s3://bucket/runs#{SECRET}",
    ],
)
def test_credentials_in_a_url_are_refused_unseen(url: str) -> None:
    """A URL that holds more than a place is refused, and the error does not repeat it."""
    with pytest.raises(ConfigError) as caught:
        s3.open_bucket(url, {})
    assert SECRET not in str(caught.value)
    assert "environment" in str(caught.value.hint)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///runs", "s3://b", "s3://bu cket/x", "s3://bucket/a//b", "s3://bucket/../x"]
)
def test_urls_that_name_no_place(url: str) -> None:
    """A URL without a bucket, or with a prefix that would be another one elsewhere, is refused."""
    with pytest.raises(ConfigError) as caught:
        Place.of(url)
    assert caught.value.hint


def test_options_are_read_as_people_write_them() -> None:
    """Sizes and durations may have units, and flags may come from a command line."""
    options = S3Options.of(
        {
            "endpoint": "https://s3.example.com:9000",
            "region": "eu-west-1",
            "anon": "false",
            "addressing": "path",
            "sse": "aws:kms",
            "sse_kms_key": "arn:aws:kms:eu-west-1:1:key/2",
            "requester_pays": True,
            "part_bytes": "64MiB",
            "parts_in_flight": "8",
            "timeout": "1m",
            "connect_timeout_s": 2.5,
        }
    )
    assert (options.part_bytes, options.parts_in_flight) == (64 * 2**20, 8)
    assert (options.timeout_s, options.connect_timeout_s) == (60.0, 2.5)
    assert (options.anon, options.requester_pays) == (False, True)
    assert S3Options.of({}) == S3Options()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"regoin": "x"}, "is region meant?"),
        ({"acl": "x"}, "it has addressing, anon"),
        ({"secret_access_key": SECRET}, "credentials come from"),
        ({"aws_access_key_id": SECRET}, "credentials come from"),
        ({"token": SECRET}, "credentials come from"),
        ({"key": SECRET}, "credentials come from"),
        ({"endpoint": f"https://me:{SECRET}@s3.example.com"}, "credentials come from"),
        ({"endpoint": "s3.example.com"}, "like https://"),
        ({"region": ""}, "like region"),
        ({"region": 5}, "like region"),
        ({"profile": "a\nb"}, "like profile"),
        ({"anon": 1}, "like anon"),
        ({"addressing": "dns"}, "auto, path, virtual"),
        ({"sse": "rot13"}, "AES256"),
        ({"sse_kms_key": "k"}, "aws:kms"),
        ({"anon": True, "profile": "p"}, "leave one"),
        ({"part_bytes": "1MiB"}, "5MiB to 5GiB"),
        ({"part_bytes": "6GiB"}, "5MiB to 5GiB"),
        ({"parts_in_flight": 0}, "like parts_in_flight"),
        ({"parts_in_flight": True}, "like parts_in_flight"),
        ({"timeout": 0}, "write it like"),
        ({"timeout": "soon"}, "write it like"),
    ],
)
def test_what_can_not_be_meant_is_refused(given: Mapping[str, object], hint: str) -> None:
    """An unknown option, a bad value and a credential are refused with a hint, and no secret is repeated."""
    with pytest.raises(ConfigError) as caught:
        S3Options.of(given)
    assert hint in str(caught.value.hint)
    assert SECRET not in str(caught.value)


def test_engines_are_loaded_when_a_tier_is_opened() -> None:
    """An agent that has the plugin and no S3 store pays for neither engine."""
    code = """
import sys
import ckptd_plugins.s3
ckptd_plugins.s3.ckptd_tiers()
print({"s3fs", "obstore", "botocore", "asyncio"} & {*sys.modules})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_it_is_registered_for_its_scheme() -> None:
    """The factory answers for s3:// and nothing else."""
    (factory,) = s3.ckptd_tiers()
    assert (factory.name, factory.schemes) == ("s3", ("s3",))


@pytest.mark.parametrize(("engine", "kind"), [(None, "ObstoreTier"), ("obstore", "ObstoreTier"), ("s3fs", "S3Tier")])
def test_a_job_may_choose_the_engine(engine: str | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either engine is opened by its name, obstore without one; both are the tier "s3" of the same place."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    options = {"endpoint": "http://127.0.0.1:1", "region": "us-east-1"}
    tier = s3.open_bucket("s3://bucket/runs", options if engine is None else {**options, "engine": engine})
    try:
        assert (type(tier).__name__, tier.name, tier.url) == (kind, "s3", "s3://bucket/runs")
    finally:
        tier.close()


def test_an_unknown_engine_is_refused() -> None:
    """The hint lists the engines that there are."""
    with pytest.raises(ConfigError, match="no engine 'boto'") as caught:
        s3.open_bucket("s3://bucket/runs", {"engine": "boto"})
    assert caught.value.hint == "engines: obstore, s3fs"

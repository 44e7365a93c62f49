"""Ways to get bytes into a bucket and back: the clients a user would pick, and our tiers over them. Run by name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ckptd.storage.tier import Tier

MIB = 2**20
CHUNK_BYTES = 16 * MIB
FLIGHT = 8
"""What boto3's users set for large files; the other clients get the same. Our tiers keep their own defaults."""


class Client(ABC):
    """One way, in a process of its own: `files` are the sources, `folder` is where files may be written."""

    def __init__(self, bucket: str, files: Sequence[Path], folder: Path) -> None:
        self.bucket, self.files, self.folder = bucket, files, folder

    @abstractmethod
    def prepare(self) -> None:
        """Bring into memory what lies there before an upload is measured."""

    @abstractmethod
    def put(self, number: int, key: str) -> None:
        """Upload a source."""

    @abstractmethod
    def get(self, number: int, key: str) -> None:
        """Download it."""

    @abstractmethod
    def got(self, number: int) -> memoryview:
        """Return what was downloaded."""

    @abstractmethod
    def put_small(self, key: str, data: bytes) -> None:
        """Put a small object."""

    @abstractmethod
    def get_small(self, key: str) -> bytes:
        """Return a small object."""

    def target(self, number: int) -> Path:
        """Return where a download is written."""
        return self.folder / f"got-{os.getpid()}-{number}"


class _ToFiles(Client):
    def prepare(self) -> None:
        """Bring nothing."""

    def got(self, number: int) -> memoryview:
        return memoryview(self.target(number).read_bytes())


class _ToMemory(Client):
    def prepare(self) -> None:
        self.data = [path.read_bytes() for path in self.files]
        self.found: list[Any] = [b""] * len(self.files)

    def got(self, number: int) -> memoryview:
        return memoryview(self.found[number])


class _S3fs(Client):
    def __init__(self, bucket: str, files: Sequence[Path], folder: Path) -> None:
        super().__init__(bucket, files, folder)
        import s3fs

        self.fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def put_small(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.bucket}/{key}", data)

    def get_small(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.bucket}/{key}"))


class S3fsFiles(_S3fs, _ToFiles):
    """s3fs, from a file into a file."""

    def put(self, number: int, key: str) -> None:
        """Upload a file."""
        path = str(self.files[number])
        self.fs.put_file(path, f"{self.bucket}/{key}", chunksize=CHUNK_BYTES, max_concurrency=FLIGHT)

    def get(self, number: int, key: str) -> None:
        """Download into a file."""
        self.fs.get_file(f"{self.bucket}/{key}", str(self.target(number)))


class S3fsBytes(_S3fs, _ToMemory):
    """s3fs, from memory into memory."""

    def put(self, number: int, key: str) -> None:
        """Upload bytes."""
        data = self.data[number]
        self.fs.pipe_file(f"{self.bucket}/{key}", data, chunksize=CHUNK_BYTES, max_concurrency=FLIGHT)

    def get(self, number: int, key: str) -> None:
        """Download bytes."""
        self.found[number] = self.fs.cat_file(f"{self.bucket}/{key}")


class _Obstore(Client):
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, bucket: str, files: Sequence[Path], folder: Path) -> None:
        super().__init__(bucket, files, folder)
        import obstore
        from obstore.store import S3Store

        self.obstore = obstore
        self.store: Any = S3Store(bucket, client_options={"allow_http": True, "timeout": "300s"}, **self.config)

    def _put(self, key: str, data: Any) -> None:
        self.obstore.put(self.store, key, data, chunk_size=CHUNK_BYTES, max_concurrency=FLIGHT)

    def put_small(self, key: str, data: bytes) -> None:
        self.obstore.put(self.store, key, data)

    def get_small(self, key: str) -> bytes:
        return bytes(self.obstore.get(self.store, key).bytes())


class ObstoreFiles(_Obstore, _ToFiles):
    """obstore, from a file into a file."""

    def put(self, number: int, key: str) -> None:
        """Upload a file."""
        self._put(key, self.files[number])

    def get(self, number: int, key: str) -> None:
        """Download into a file."""
        with self.target(number).open("wb") as file:
            for chunk in self.obstore.get(self.store, key).stream(min_chunk_size=MIB):
                file.write(chunk)


class ObstoreBytes(_Obstore, _ToMemory):
    """obstore, from memory into memory."""

    def put(self, number: int, key: str) -> None:
        """Upload bytes."""
        self._put(key, self.data[number])

    def get(self, number: int, key: str) -> None:
        """Download bytes."""
        self.found[number] = self.obstore.get(self.store, key).bytes()


class ObstoreUnsigned(ObstoreBytes):
    """obstore with a checksum instead of a signature over the bytes: what it does over https."""

    config: ClassVar[dict[str, Any]] = {"unsigned_payload": True, "checksum_algorithm": "CRC64NVME"}


class Boto3(_ToFiles):
    """boto3's transfer manager, from a file into a file."""

    def __init__(self, bucket: str, files: Sequence[Path], folder: Path) -> None:
        super().__init__(bucket, files, folder)
        import boto3
        from boto3.s3.transfer import TransferConfig

        self.client = boto3.client("s3")
        size = CHUNK_BYTES
        self.config = TransferConfig(multipart_threshold=size, multipart_chunksize=size, max_concurrency=FLIGHT)

    def put(self, number: int, key: str) -> None:
        """Upload a file."""
        self.client.upload_file(str(self.files[number]), self.bucket, key, Config=self.config)

    def get(self, number: int, key: str) -> None:
        """Download into a file."""
        self.client.download_file(self.bucket, key, str(self.target(number)), Config=self.config)

    def put_small(self, key: str, data: bytes) -> None:
        """Put a small object."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def get_small(self, key: str) -> bytes:
        """Return a small object."""
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())


class FileStream:
    """A file as a stream, as the agent uploads shards."""

    def __init__(self, path: Path) -> None:
        self.size_bytes = path.stat().st_size
        self._file = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Read a part."""
        count = os.preadv(self._file, [into], offset)
        assert count == len(into), "the source is short"


class _OurTier(Client):
    """One of our tiers: uploads a stream of a file, downloads into memory that is there already."""

    def __init__(self, bucket: str, files: Sequence[Path], folder: Path) -> None:
        super().__init__(bucket, files, folder)
        self.tier = self.open(f"s3://{bucket}")

    @abstractmethod
    def open(self, url: str) -> Tier:
        """Open the tier."""

    def prepare(self) -> None:
        self.tier.put("warm", bytes(2 * MIB))  # what large objects need is made for the first one
        self.room = [memoryview(bytearray(b"\1" * path.stat().st_size)) for path in self.files]

    def put(self, number: int, key: str) -> None:
        self.tier.put(key, FileStream(self.files[number]))

    def get(self, number: int, key: str) -> None:
        self.tier.read_into(key, 0, self.room[number])

    def got(self, number: int) -> memoryview:
        return self.room[number]

    def put_small(self, key: str, data: bytes) -> None:
        self.tier.put(key, data)

    def get_small(self, key: str) -> bytes:
        return self.tier.get(key)


class OurS3fs(_OurTier):
    """The tier over s3fs."""

    def open(self, url: str) -> Tier:
        """Open it."""
        from ckptd_plugins.storage_s3 import open_s3

        return open_s3(url)


class OurObstore(_OurTier):
    """The tier over obstore."""

    def open(self, url: str) -> Tier:
        """Open it."""
        from ckptd_plugins.storage_obstore import open_obstore

        return open_obstore(url)


class OurObstoreBuffers(OurObstore):
    """The tier over obstore, from memory: what a slot is."""

    def prepare(self) -> None:
        """Have the sources in memory too."""
        super().prepare()
        self.data = [path.read_bytes() for path in self.files]

    def put(self, number: int, key: str) -> None:
        """Upload a buffer."""
        self.tier.put(key, self.data[number])


CLIENTS: dict[str, Callable[[str, Sequence[Path], Path], Client]] = {
    "s3fs files": S3fsFiles,
    "s3fs bytes": S3fsBytes,
    "obstore files": ObstoreFiles,
    "obstore bytes": ObstoreBytes,
    "obstore bytes, payload unsigned": ObstoreUnsigned,
    "boto3 files": Boto3,
    "S3Tier stream": OurS3fs,
    "ObstoreTier stream": OurObstore,
    "ObstoreTier buffer": OurObstoreBuffers,
}
OURS = ("S3Tier stream", "ObstoreTier stream")

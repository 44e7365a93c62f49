"""A job's place in a bucket, as the judge needs it: looked at, copied and filled with botocore alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.gate import Request
from tests.object_store.server import Server

_DELETED = re.compile(rb"<Key>([^<]+)</Key>")


@dataclass
class Bucket:
    """A prefix of a bucket on a real server."""

    server: Server
    name: str
    prefix: str

    def __post_init__(self) -> None:
        self.client: Any = self.server.client()

    @property
    def url(self) -> str:
        """What `--store` takes."""
        return f"s3://{self.name}/{self.prefix}"

    def keys(self) -> list[str]:
        """Return the keys of all objects, seen from the prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{self.prefix}/")
        return [item["Key"].removeprefix(f"{self.prefix}/") for page in pages for item in page.get("Contents", ())]

    def download(self, folder: Path) -> None:
        """Bring everything into a folder."""
        for key in self.keys():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.client.get_object(Bucket=self.name, Key=f"{self.prefix}/{key}")["Body"].read())

    def fill(self, folder: Path) -> None:
        """Put everything that lies below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{self.prefix}/{path.relative_to(folder)}"
                self.client.put_object(Bucket=self.name, Key=key, Body=path.read_bytes())

    def remove(self) -> None:
        """Delete everything."""
        for key in self.keys():
            self.client.delete_object(Bucket=self.name, Key=f"{self.prefix}/{key}")

    def open_uploads(self) -> list[str]:
        """Return the keys of multipart uploads that nobody has completed or aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name, Prefix=f"{self.prefix}/")
        return [item["Key"] for item in found.get("Uploads", ())]

    def calls(self, requests: Sequence[Request], folder: Path) -> Iterator[dict[str, Any]]:
        """Tell what requests did in the words of file-system calls, with `folder` standing for the prefix."""
        for request in requests:
            if request.status >= 300:
                continue
            if request.method == "PUT" and "uploadId" not in request.query:
                yield {"call": "rename", "begin": True, "done": True, "paths": [None, self._path(request.key, folder)]}
            if request.method == "DELETE" and "uploadId" not in request.query:
                yield {"call": "unlink", "begin": True, "paths": [self._path(request.key, folder)]}
            if request.method == "POST" and request.query.startswith("delete"):
                for key in _DELETED.findall(request.body):
                    path = self._path(f"/{self.name}/{key.decode()}", folder)
                    yield {"call": "unlink", "begin": True, "paths": [path]}

    def _path(self, key: str, folder: Path) -> str:
        return str(folder.resolve() / key.removeprefix(f"/{self.name}/{self.prefix}/"))

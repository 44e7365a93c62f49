"""The tensors of an image as sources of a restore: checked first, copied after, never lent out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ckptd.errors import DamagedError, StateError, unreachable
from ckptd.storage.digest import digest
from ckptd.storage.image import Layout
from ckptd.types import TensorSpan
from ckptd_integrations.torch.copying import copy_bytes
from ckptd_integrations.torch.nodes import Document
from ckptd_integrations.torch.tensors import DTYPES, View, dtype_name, unsupported_kind

_ORDINARY = View(None, None, None)


def verify(image: memoryview, layout: Layout, digests: Mapping[str, str]) -> None:
    """Compare every tensor, the values included, with its digest; raises `DamagedError` naming the first that differs.

    A tensor without a digest counts as damaged: a restore that checks must not leave out what it can't check.
    """
    for span in layout.spans:
        expected = digests.get(span.name)
        if expected is None:
            raise DamagedError(f"tensor {span.name!r} has no digest", hint="restore from another copy")
        if digest(image[span.begin : span.end]) != expected:
            raise DamagedError(
                f"tensor {span.name!r} is damaged: its digest is not the one its bytes were sealed with",
                hint="restore from another copy or an earlier checkpoint",
            )


class ImageTensors:
    """Knows the tensors of one image, checks targets against them and copies them when all have been checked.

    Until `opened` it works on the header alone, so an error found while checking keeps no view of the image alive.
    """

    def __init__(self, layout: Layout, document: Document) -> None:
        self._spans = {span.name: span for span in layout.spans}
        self._aliases = document.aliases
        self._views = document.views
        self._copies: list[tuple[str, Tensor]] = []
        self._elements: Tensor | None = None

    def check(self, name: str, target: Tensor, path: str, where: str) -> None:
        """Raise `StateError` unless the tensor `name` of the image can be copied into `target`, which lies at `path`.

        `where` says in words what holds the target.
        """
        span, view = self._find(name)
        dtype, shape = _dtype_and_shape(span, view)
        kind = unsupported_kind(target)
        if kind is not None or (target.numel() and target.is_cpu and not target.data_ptr()):
            raise StateError(
                f"tensor {path!r} can't be filled: {where} it is {kind or 'a tensor without memory'}",
                hint="materialise the model before it is attached",
            )
        if tuple(target.shape) != shape:
            raise StateError(
                f"tensor {path!r} is {list(shape)} in the checkpoint and {list(target.shape)} {where}",
                hint="build the same model as the captured run did, or start a new job",
            )
        if target.dtype != dtype:
            raise StateError(
                f"tensor {path!r} is {dtype_name(dtype)} in the checkpoint and {dtype_name(target.dtype)} {where}",
                hint="use the dtype of the captured run, or start a new job: a conversion would lose bits",
            )

    def plan_copy(self, name: str, target: Tensor, path: str, where: str) -> None:
        """Check like `check`, and note that `target` is to be filled by `run_copies`."""
        self.check(name, target, path, where)
        self._copies.append((name, target))

    def require(self, name: str) -> None:
        """Raise `DamagedError` unless the image has the tensor `name`."""
        self._find(name)

    @contextmanager
    def opened(self, image: memoryview) -> Iterator[None]:
        """Give access to the bytes of `image`, and leave no view of them behind."""
        with warnings.catch_warnings():
            # Nothing is written to it; torch has no tensors that know this.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            self._elements = torch.frombuffer(image, dtype=torch.uint8)
        try:
            yield
        finally:
            self._elements = None

    def run_copies(self) -> None:
        """Fill all targets of `plan_copy`; nothing is converted on the way."""
        base = self._bytes().data_ptr()
        direct: list[Tensor] = []
        sources: list[int] = []
        sizes: list[int] = []
        for name, target in self._copies:
            span, view = self._find(name)
            if target.is_cpu and target.is_contiguous() and view.dtype is None and not _is_lazy(target):
                direct.append(target)
                sources.append(base + span.begin)
                sizes.append(span.end - span.begin)
            elif target.numel():
                _fill(target, self._source(span, view))
        copy_bytes(list(map(Tensor.data_ptr, direct)), sources, sizes)
        for target in direct:
            # A graph that still needs the old elements has to notice, as it does after `copy_`.
            torch.autograd.graph.increment_version(target)

    def clone(self, name: str) -> Tensor:
        """Return a new tensor with the elements, strides and kind of device of the captured one."""
        span, view = self._find(name)
        dtype, shape = _dtype_and_shape(span, view)
        device = _device(view.device)
        if view.strides is None:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        else:
            tensor = torch.empty_strided(shape, view.strides, dtype=dtype, device=device)
        return tensor.copy_(self._source(span, view)) if tensor.numel() else tensor

    def _find(self, name: str) -> tuple[TensorSpan, View]:
        first = self._aliases.get(name, name)
        span = self._spans.get(first)
        if span is None or span.dtype not in DTYPES:
            raise DamagedError(f"tensor {name!r} is missing from a shard whose values name it")
        return span, self._views.get(first, _ORDINARY)

    def _bytes(self) -> Tensor:
        if self._elements is None:
            unreachable("tensors of an image are read only while it is open")
        return self._elements

    def _source(self, span: TensorSpan, view: View) -> Tensor:
        source = self._bytes()[span.begin : span.end].view(DTYPES[span.dtype]).view(span.shape)
        # Pairs need the alignment of both halves, which an image does not give them.
        return source if view.dtype is None else torch.view_as_complex(source.clone())


def _dtype_and_shape(span: TensorSpan, view: View) -> tuple[torch.dtype, tuple[int, ...]]:
    if view.dtype is None:
        return DTYPES[span.dtype], span.shape
    return torch.complex128, span.shape[:-1]


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def _fill(target: Tensor, source: Tensor) -> None:
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            # An expanded tensor has one element where it shows many.
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)


def _device(kind: str | None) -> torch.device:
    module = None if kind is None else getattr(torch, kind, None)
    here = module is not None and module.is_available()
    return torch.device(kind if here and kind is not None else "cpu")

"""What the image has to know of tensors: dtypes, shapes, what can't be captured, and which ones are the same.

Everything that runs once per tensor runs in C, over whole lists: a capture of 10,000 small tensors is otherwise spent
in the interpreter. Only what is out of the ordinary (not contiguous, not in main memory, complex) is looked at singly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, not_
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ckptd.errors import StateError
from ckptd_integrations.torch.local_boxes import is_dtensor, unsupported_placement

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.complex64: "C64",
    torch.float32: "F32", torch.int32: "I32", torch.uint32: "U32",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names that the safetensors format has for torch's dtypes."""
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
"""Tensor classes that hold their elements and nothing else."""


class View(NamedTuple):
    """What the header of an image can't say about a tensor, and a new one must know to be like the old."""

    dtype: str | None
    """The dtype when its elements are stored as another one: complex128 as pairs of F64."""
    strides: tuple[int, ...] | None
    """The strides of a tensor that is dense but in another order, such as channels-last."""
    device: str | None
    """The kind of device when it was not in main memory."""


@dataclass(slots=True)
class TensorTable:
    """The tensors of one capture, each once, in the order in which they were met."""

    names: list[str]
    owners: list[Tensor]
    """The tensors themselves, as the state has them."""
    tensors: list[Tensor]
    """What holds their elements: of a DTensor its local tensor, of complex128 a view as pairs."""
    dtypes: list[str]
    pointers: list[int]
    odd: list[int]
    """Indexes of tensors that are not contiguous elements in main memory: `copy_` has to convert them."""
    aliases: dict[str, str]
    """Names of tensors that share all memory with an earlier one, and that one's name."""
    views: dict[str, View]
    dtensors: dict[int, Any] = field(default_factory=dict)
    """The DTensors among the owners, by index."""

    def current_pointers(self) -> list[int]:
        """Return where the tensors are now; raises `StateError` when one has moved since it was described.

        What was described is what will be copied by address, so this comes right before copying.
        """
        pointers = list(map(Tensor.data_ptr, self.tensors))
        if pointers != self.pointers:
            moved = next(i for i, pointer in enumerate(pointers) if pointer != self.pointers[i])
            raise StateError(
                f"tensor {self.names[moved]!r} got other memory while it was being captured",
                hint="let no other thread change the model at a step's boundary",
            )
        return pointers


def tabulate(names: list[str], tensors: list[Tensor]) -> TensorTable:
    """Describe `tensors` without copying any; raises `StateError` naming one that can't be captured."""
    owners, tensors = tensors, list(tensors)
    dtensors = _open_dtensors(names, tensors)
    try:
        dtypes = list(map(attrgetter("dtype"), tensors))
        contiguous = list(map(Tensor.is_contiguous, tensors))
        pointers = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        # Sparse, nested and other exotic tensors answer none of these questions.
        _refuse_first(names, tensors)
        raise
    odd = _find_odd(tensors, dtypes, contiguous)
    suspects = odd if DTYPE_NAMES.keys() >= set(dtypes) else range(len(tensors))
    for index in suspects:
        kind = unsupported_kind(tensors[index])
        if kind is not None:
            refuse(names[index], kind)
    aliases = _find_aliases(names, tensors, pointers, dtensors)
    views = {}
    for index in odd:
        tensor = tensors[index]
        # A local tensor's strides say nothing of the one that another mesh will have.
        view = _view_of(tensor, contiguous=contiguous[index] or index in dtensors)
        if view != View(None, None, None) and names[index] not in aliases:
            views[names[index]] = view
        if tensor.dtype is torch.complex128:
            tensors[index] = torch.view_as_real(tensor.detach().resolve_conj())
            dtypes[index], pointers[index] = torch.float64, tensors[index].data_ptr()
    table = TensorTable(names, owners, tensors, [], pointers, odd, aliases, views, dtensors)
    if aliases:
        dtypes = _drop_aliases(table, dtypes)
    table.dtypes = [DTYPE_NAMES[dtype] for dtype in dtypes]
    if 0 in table.pointers:
        _refuse_freed(table)
    return table


def _open_dtensors(names: Sequence[str], tensors: list[Tensor]) -> dict[int, Any]:
    """Put local tensors in the place of DTensors, and return those by index."""
    if set(map(type, tensors)) <= PLAIN_TYPES:
        return {}
    dtensors: dict[int, Any] = {}
    for index, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            kind = unsupported_kind(tensor)
            if kind is not None:
                refuse(names[index], kind)
            dtensors[index] = tensor
            tensors[index] = local_tensor(tensor)
    return dtensors


def _drop_aliases(table: TensorTable, dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """Leave each tensor in the table once; returns the dtypes of those that stay."""
    kept = [name not in table.aliases for name in table.names]
    numbers = {index: number for number, index in enumerate(_where(kept))}
    table.odd = [numbers[index] for index in table.odd if index in numbers]
    table.dtensors = {numbers[index]: item for index, item in table.dtensors.items() if index in numbers}
    table.names = list(compress(table.names, kept))
    table.owners, table.tensors = list(compress(table.owners, kept)), list(compress(table.tensors, kept))
    table.pointers = list(compress(table.pointers, kept))
    return list(compress(dtypes, kept))


def local_tensor(tensor: Any) -> Tensor:
    """Return what holds a DTensor's elements on this rank; `to_local()` would make another tensor each time."""
    local: Tensor = tensor._local_tensor  # noqa: SLF001 - as everybody does
    return local


def unsupported_kind(tensor: Tensor) -> str | None:
    """Return what is wrong with a tensor that can't be captured, in words, or None."""
    if is_dtensor(tensor):
        return unsupported_placement(tensor) or unsupported_kind(local_tensor(tensor))
    kind = type(tensor)
    if is_lazy(tensor):
        return "an uninitialised parameter"
    if kind not in PLAIN_TYPES and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__module__}.{kind.__qualname__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return f"a quantised tensor ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.is_meta:
        return "a meta tensor"
    if tensor.dtype not in DTYPE_NAMES and tensor.dtype is not torch.complex128:
        return f"a tensor of dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None


def refuse(name: str, kind: str) -> NoReturn:
    """Raise the `StateError` that names a tensor and what it is."""
    hint = "convert it to a plain dense tensor, or leave it out of the state"
    if "uninitialised" in kind:
        hint = "run one forward pass before the model is attached"
    raise StateError(f"state {name!r} holds {kind}, which can't be captured", hint=hint)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as people write it, without the module."""
    return str(dtype).removeprefix("torch.")


_on_cpu, _is_nested = attrgetter("is_cpu"), attrgetter("is_nested")


def _find_odd(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], contiguous: Sequence[bool]) -> list[int]:
    odd: set[int] = set()
    if not all(contiguous):
        odd.update(_where(map(not_, contiguous)))
    if not all(map(_on_cpu, tensors)):
        odd.update(_where(map(not_, map(_on_cpu, tensors))))
    if any(map(_is_nested, tensors)):
        odd.update(_where(map(_is_nested, tensors)))
    if any(map(Tensor.is_neg, tensors)):
        odd.update(_where(map(Tensor.is_neg, tensors)))
    if any(dtype.is_complex for dtype in set(dtypes)):
        odd.update(_where(dtype.is_complex for dtype in dtypes))
    return sorted(odd)


def _where(flags: Iterable[Any]) -> Iterator[int]:
    return (index for index, flag in enumerate(flags) if flag)


def _refuse_first(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        kind = unsupported_kind(tensor)
        if kind is not None:
            refuse(name, kind)


def _refuse_freed(table: TensorTable) -> None:
    for index, pointer in enumerate(table.pointers):
        if pointer == 0 and table.tensors[index].numel():
            refuse(table.names[index], "a tensor without memory (its storage was resized to nothing)")


def _view_of(tensor: Tensor, *, contiguous: bool) -> View:
    strides = None
    if not contiguous and torch.empty_like(tensor, device="meta").stride() == tensor.stride():
        # `empty_like` keeps the strides of exactly those tensors that are dense and don't overlap.
        strides = tensor.stride()
    return View(
        "complex128" if tensor.dtype is torch.complex128 else None,
        strides,
        None if tensor.is_cpu else tensor.device.type,
    )


def _find_aliases(
    names: Sequence[str], tensors: Sequence[Tensor], pointers: Sequence[int], dtensors: Mapping[int, Any]
) -> dict[str, str]:
    if len(set(pointers)) == len(pointers):
        return {}
    uses = Counter(pointers)
    if not dtensors:
        uses[0] = 0  # Tensors without elements all lie nowhere.
    first: dict[object, str] = {}
    aliases = {}
    for index, (name, tensor, pointer) in enumerate(zip(names, tensors, pointers, strict=True)):
        if uses[pointer] < 2:
            continue
        key: tuple[object, ...]
        if pointer == 0:
            # A tied DTensor of which this rank has nothing is an alias all the same, as it is on the other ranks.
            key = (id(dtensors.get(index, name)),)
        else:
            key = (pointer, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            key += (tensor.is_conj(), tensor.is_neg(), _placing(dtensors.get(index)))
        earlier = first.setdefault(key, name)
        if earlier != name:
            aliases[name] = earlier
    return aliases


def _placing(dtensor: Any) -> object:
    return None if dtensor is None else (dtensor.device_mesh, dtensor.placements, dtensor.shape)

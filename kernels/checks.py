"""The check of an op's tensors: a table of shapes and dtypes, which is also what the error says.

A row of the table is like "x [K, N] fp32". A name in brackets stands for one size wherever it occurs, a formula like
`2 * F` is of names before it, and the word dtype is one floating dtype for all. A row without a dtype takes any; one
that ends in "or none" takes None, too. As decoding calls ops by the thousand, a table is made into one expression.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TABLE_DTYPES = {"fp32": torch.float32, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}


def takes(op: str, table: str, *sizes: str) -> Callable[..., None]:
    """A function of the table's tensors, and of those sizes that the caller knows, by keyword.

    It raises ValueError when a tensor does not fit or is not contiguous.
    """
    rows = [row.strip() for row in table.split(";")]
    names = [row.partition(" ")[0] for row in rows]

    def refuse(*tensors: Tensor | None) -> None:
        found = ", ".join(map(_describe, names, tensors))
        raise ValueError(f"{op} takes contiguous {', '.join(rows)}, got {found}")

    known = set(sizes)
    conditions = " and ".join(_condition(row, known) for row in rows)
    parameters, arguments = ", ".join((*names, *sizes)), ", ".join(names)
    return eval(f"lambda {parameters}: ({conditions}) or refuse({arguments})", TABLE_DTYPES | {"refuse": refuse})


def _condition(row: str, known: set[str]) -> str:
    """The expression that is true for a tensor of that row; it gives names that are not known their values."""
    name, _, rest = row.removesuffix(" or none").partition(" [")
    shape, _, dtype = rest.partition("]")
    shape = [size.strip() for size in shape.split(",")]
    parts = [
        f"({size} := s[{i}])" if size.isidentifier() and size not in known else size for i, size in enumerate(shape)
    ]
    terms = [f"len(s := {name}.shape) == {len(shape)}", f"s == ({', '.join(parts)},)", f"{name}.is_contiguous()"]
    if dtype == " dtype" and "dtype" not in known:
        terms.append(f"(dtype := {name}.dtype).is_floating_point")
    elif dtype:
        terms.append(f"{name}.dtype == {dtype}")
    known.update((*shape, dtype.strip()))
    fits = " and ".join(terms)
    return f"({name} is None or {fits})" if row.endswith(" or none") else f"{name} is not None and {fits}"


def _describe(name: str, tensor: Tensor | None) -> str:
    if tensor is None:
        return f"no {name}"
    strided = "" if tensor.is_contiguous() else " strided"
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{strided}"

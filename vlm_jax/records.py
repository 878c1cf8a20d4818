"""Configurations as JSON and back: frozen dataclasses of this package, nested in any way.

A dataclass is an object of its fields. Where the declared type leaves open which dataclass it is, as `Any` and a union
of several do, its name within the package stands beside them: `{"is": "models.vae.Config", "latent": 16, ...}`.
"""

import dataclasses
import functools
import importlib
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from vlm_jax.errors import UserError

PACKAGE = "vlm_jax"
IS = "is"
"""The key of a type's name; no field can be called so in Python."""
SCALARS = (str, int, float, bool, types.NoneType)
"""What `Any` stands for beside dataclasses and tuples."""


def to_json(value: Any) -> Any:
    """A dataclass as JSON values, every field written out.

    Numbers become those of the declared types, so that equal configurations are equal texts.

    Raises:
      UserError: a field does not hold what it declares, or a type that must be named is not of this package: what was
        written could not be read back.
    """
    return _write(type(value), value, "")


def from_json(declared: Any, data: Any) -> Any:
    """The inverse of `to_json`.

    A field that is absent has its default, as it had for the version that wrote the record and did not know it.

    Args:
      declared: the type of the dataclass; `Any`: `data` names it.

    Raises:
      UserError: a field is unknown, or missing without a default, or does not hold what it declares.
    """
    return _read(declared, data, "")


def name_of(kind: type) -> str:
    """A type's name within the package, such as "models.vae.Config".

    Raises:
      UserError: it is not of this package.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not name.startswith(f"{PACKAGE}."):
        raise UserError(f"{name} is no configuration of {PACKAGE}, so that a run's record could not be read back")
    return name.removeprefix(f"{PACKAGE}.")


def _write(declared: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        kinds = _dataclasses(declared)
        if declared is not Any and kind not in kinds:
            raise _wrong(path, kind.__name__, declared)
        named = {} if len(kinds) == 1 else {IS: name_of(kind)}
        fields = _field_types(kind).items()
        return named | {name: _write(of, getattr(value, name), join(path, name)) for name, of in fields}
    if isinstance(value, tuple):
        return [_write(of, item, join(path, i)) for i, (of, item) in enumerate(_items(declared, value, path))]
    return _leaf(declared, value, path)


def _read(declared: Any, data: Any, path: str) -> Any:
    kinds = _dataclasses(declared)
    if isinstance(data, Mapping) and (kinds or declared is Any):
        fields = dict(data)
        kind = kinds[0] if len(kinds) == 1 else _named(declared, str(fields.pop(IS, None)), path)
        known = _field_types(kind)
        if unknown := [name for name in fields if name not in known]:
            raise UserError(f"the record has the field {join(path, unknown[0])}, which this version does not know")
        values = {name: _read(known[name], value, join(path, name)) for name, value in fields.items()}
        if missing := [field.name for field in dataclasses.fields(kind) if field.name not in values and _due(field)]:
            raise UserError(f"the record lacks the field {join(path, missing[0])}")
        return kind(**values)
    if isinstance(data, list):
        return tuple(_read(of, item, join(path, i)) for i, (of, item) in enumerate(_items(declared, data, path)))
    return _leaf(declared, data, path)


def _leaf(declared: Any, value: Any, path: str) -> Any:
    # msgspec refuses a union of several dataclasses, which are read above.
    simple = [each for each in _options(declared) if typing.get_origin(each) is not tuple and not _is_dataclass(each)]
    try:
        if simple:
            return msgspec.convert(value, functools.reduce(operator.or_, simple))
    except msgspec.ValidationError:
        pass
    raise _wrong(path, repr(value), declared)


def _items(declared: Any, items: Any, path: str) -> list[tuple[Any, Any]]:
    """Each item of a tuple beside its declared type."""
    if declared is Any:
        return [(Any, item) for item in items]
    declared_tuples = [typing.get_args(each) for each in _options(declared) if typing.get_origin(each) is tuple]
    for each in declared_tuples:
        of = each[:1] * len(items) if each[1:] == (Ellipsis,) else each
        if len(of) == len(items):
            return list(zip(of, items, strict=True))
    raise _wrong(path, repr(items), declared)


def _named(declared: Any, name: str, path: str) -> Any:
    """The dataclass of a name.

    Raises:
      UserError: there is none, or it may not stand here.
    """
    by_name = {name_of(kind): kind for kind in _dataclasses(declared)}
    if name in by_name:
        return by_name[name]
    where = f"{join(path, IS)} is {name!r}"
    if declared is not Any:
        raise UserError(f"{where}: it must be one of {', '.join(by_name)}")
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(f"{PACKAGE}.{module}"), attribute)
    except (ImportError, AttributeError):
        kind = None
    if not (_is_dataclass(kind) and name_of(kind) == name):
        raise UserError(f"{where}: this version of {PACKAGE} has no such configuration")
    return kind


def _wrong(path: str, value: str, declared: Any) -> UserError:
    return UserError(f"{path or 'the record'} is {value}: it must be {' or '.join(map(_spelt, _options(declared)))}")


def _spelt(declared: Any) -> str:
    if typing.get_origin(declared) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(declared)))
    if declared is types.NoneType:
        return "None"
    return declared.__name__ if type(declared) is type else str(declared)  # tuple[int, ...] is its own name


def _options(declared: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else itself."""
    if declared is Any:
        return SCALARS
    return typing.get_args(declared) if typing.get_origin(declared) in (typing.Union, types.UnionType) else (declared,)


def _dataclasses(declared: Any) -> list[Any]:
    return [each for each in _options(declared) if _is_dataclass(each)]


def _is_dataclass(declared: Any) -> bool:
    return isinstance(declared, type) and dataclasses.is_dataclass(declared)


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _due(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def join(path: str, name: str | int) -> str:
    """A dotted path, one name longer."""
    return f"{path}.{name}" if path else str(name)

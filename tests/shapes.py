"""What `jaxtyping`'s import hook checks calls of the library by, in these tests: the shape and dtype of every array."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax
from jaxtyping import AbstractArray, Int, Integer, jaxtyped


def arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses arrays that differ from their annotations; of what else is annotated mypy has checked the types.

    A general checker costs more than the tests can spare, and would have them convert NumPy's arrays.
    """
    signature = inspect.signature(function)
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    hints = {name: hint for name, hint in hints.items() if speaks_of_arrays(hint)}
    returned = signature.return_annotation if speaks_of_arrays(signature.return_annotation) else None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments if hints else {}
        for name, hint in hints.items():
            if name in given and not fits(given[name], hint):
                raise TypeError(f"{name} is not {hint}")
        result = function(*args, **kwargs)
        if returned is not None and not fits(result, returned):
            raise TypeError(f"what is returned is not {returned}")
        return result

    return checked


def fits(value: Any, hint: Any) -> bool:
    """Whether the value, as far as it is arrays, is one of what the hint allows."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, each) for each in get_args(hint) if each is not type(None)) or value is None
    if isinstance(value, jax.Array) and is_array(hint):
        # Whole numbers are whole numbers: an image is uint8 as it is stored and int32 where it is drawn.
        kinds = (hint, Integer[hint.array_type, hint.dim_str]) if hint.dtype is Int else (hint,)
        return any(isinstance(value, kind) for kind in kinds)
    if type(value) in (tuple, list) and get_origin(hint) is type(value):
        inner = get_args(hint)
        same = len(inner) == 1 or inner[1:] == (...,)  # of any length
        return all(map(fits, value, inner[:1] * len(value) if same else inner))
    if isinstance(value, Mapping) and len(get_args(hint)) == 2:
        return all(fits(each, get_args(hint)[1]) for each in value.values())
    if is_named_tuple(hint) and isinstance(value, hint):
        with jaxtyped("context"):  # the letters of its axes are its own
            return all(fits(getattr(value, name), of) for name, of in fields(hint).items())
    return True


def is_array(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def is_named_tuple(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")


fields = functools.cache(get_type_hints)


def speaks_of_arrays(hint: Any) -> bool:
    """Whether there is anything to check."""
    inner = fields(hint).values() if is_named_tuple(hint) else get_args(hint)
    return is_array(hint) or any(map(speaks_of_arrays, inner))

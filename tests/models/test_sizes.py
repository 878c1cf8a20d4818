"""A number that no model can have is refused by its name, in every family and every part of one."""

from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any

import pytest

from experiments.presets import presets
from vlm_jax.errors import UserError
from vlm_jax.models import SIZES, build

TINY = {name: experiment.model for name, (_, experiment) in presets().items() if "tiny" in name}


def numbers(config: Any, path: str = "model") -> Iterator[tuple[str, int, Callable[[Any], Any]]]:
    """Each number of a configuration: its name, its least value, and what gives it another."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"

        def change(other: Any, field: Field = field, value: Any = value) -> Any:
            return replace(config, **{field.name: (other,) * len(value) if isinstance(value, tuple) else other})

        if is_dataclass(value):
            for inner, least, change_part in numbers(value, name):
                yield inner, least, lambda other, change=change, part=change_part: change(part(other))
        elif field.name in SIZES and value is not None:
            yield name, 1, change
        elif type(value) is int:
            yield name, 0, change


@pytest.mark.parametrize("name", TINY)
def test_a_number_below_its_least_is_refused_by_its_name(name: str) -> None:
    for field, least, change in numbers(TINY[name]):
        with pytest.raises(UserError, match=field.rpartition(".")[2]):
            build(change(least - 1))


def test_a_size_within_a_part_is_named_by_its_path() -> None:
    model = TINY["clip-tiny"]
    text = replace(model.text, transformer=replace(model.text.transformer, mlp=0))
    with pytest.raises(UserError, match=r"^model\.text\.transformer\.mlp is 0: it must be at least 1$"):
        build(replace(model, text=text))


@pytest.mark.parametrize(
    ("setting", "value", "range_"),
    [
        ("dropout", -0.1, r"at least 0 and less than 1"),
        ("dropout", 1.0, r"at least 0 and less than 1"),
        ("norm_eps", 0.0, "above 0"),
        ("norm_eps", -1e-6, "above 0"),
    ],
)
def test_a_share_and_an_epsilon_have_their_ranges_wherever_they_stand(setting: str, value: float, range_: str) -> None:
    model = TINY["clip-tiny"]
    text = replace(model.text, transformer=replace(model.text.transformer, **{setting: value}))
    with pytest.raises(UserError, match=rf"^model\.text\.transformer\.{setting} is {value}: it must be {range_}$"):
        build(replace(model, text=text))


def test_a_network_that_is_never_told_the_class_is_refused() -> None:
    model = TINY["diffusion-tiny-ddpm"]
    with pytest.raises(UserError, match=r"^model\.network\.condition_dropout is 1\.0"):
        build(replace(model, network=replace(model.network, condition_dropout=1.0)))

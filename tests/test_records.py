"""Configurations as JSON and back: every family, parts of any family, and what cannot be read, by its path."""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

import smallest
from experiments.presets import presets
from vlm_jax.errors import UserError
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import UNet
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.records import from_json, to_json

MODELS = {name: experiment.model for name, (_, experiment) in presets().items()} | smallest.CONFIGS
TRANSFORMER = Transformer(width=8, depth=1, heads=2, mlp=8)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a family made of parts looks like: each may be of several kinds, or of any."""

    network: UNet | DiT
    stage1: Any = None
    tower: VisionTransformer | None = None
    rates: tuple[tuple[str, float], ...] = ()
    parts: tuple[UNet | DiT, ...] = ()
    size: tuple[int, str] | None = None
    scale: float | None = None
    mode: Literal["one", "two"] = "one"


WHOLE = Whole(
    network=DiT(patch_size=2, transformer=TRANSFORMER),
    stage1=smallest.VAE,
    tower=smallest.CLIP.image,
    rates=(("head", 10.0), ("^image/", 0.0)),
    parts=(UNet(widths=(8, 16), blocks=1, groups=4), DiT(patch_size=1, transformer=TRANSFORMER)),
    size=(3, "large"),
    scale=0.5,
    mode="two",
)


def through_text(declared: Any, value: Any) -> Any:
    return from_json(declared, json.loads(json.dumps(to_json(value))))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_reads_back_exactly(name: str) -> None:
    config = MODELS[name]
    assert through_text(type(config), config) == config
    held = replace(WHOLE, stage1=config)
    assert through_text(Whole, held) == held


def test_a_type_is_named_where_the_declared_one_leaves_it_open_and_nowhere_else() -> None:
    record = to_json(WHOLE)
    named = {"network": "nn.dit.DiT", "stage1": "models.vae.Config"}
    assert {name: part["is"] for name, part in record.items() if isinstance(part, dict) and "is" in part} == named
    assert [part["is"] for part in record["parts"]] == ["nn.unet.UNet", "nn.dit.DiT"]
    assert "is" not in record and "is" not in record["tower"] and "is" not in record["network"]["transformer"]


def test_parts_of_several_kinds_are_told_apart_by_their_names_alone() -> None:
    """The two have fields in common; neither is guessed from them."""
    for network in (WHOLE.network, WHOLE.parts[0]):
        held = Whole(network=network, parts=(network,))
        assert through_text(Whole, held) == held
    assert through_text(Whole, WHOLE) == WHOLE


@pytest.mark.parametrize("anything", [None, True, 3, 0.5, "text", (), (1, ("a", smallest.VAE))])
def test_what_is_declared_as_anything_keeps_its_type(anything: Any) -> None:
    read = through_text(Whole, replace(WHOLE, stage1=anything)).stage1
    assert read == anything and type(read) is type(anything)


def test_a_whole_number_of_a_float_field_is_a_float() -> None:
    """So that a configuration is one text, and a run one identity, however its numbers were spelt."""
    whole, same = replace(WHOLE, scale=1), replace(WHOLE, scale=1.0)
    assert json.dumps(to_json(whole)) == json.dumps(to_json(same))
    assert type(from_json(Whole, to_json(same) | {"scale": 1}).scale) is float


def test_a_field_that_an_older_record_lacks_has_its_default() -> None:
    record = to_json(WHOLE)
    del record["network"]["transformer"]["remat"], record["mode"]
    assert from_json(Whole, record) == replace(WHOLE, mode="one")


def changed(record: Any, path: str, change: Any) -> Any:
    """The record with `change` applied to the object or list that holds the end of the path, and its key there."""
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    branch = record
    for name in parents:
        branch = branch[name]
    change(branch, last)
    return record


@pytest.mark.parametrize("path", ["rope", "tower.rope", "network.rope", "parts.1.transformer.rope", "tower.is"])
def test_a_field_that_is_not_known_is_refused_by_its_path(path: str) -> None:
    record = changed(to_json(WHOLE), path, lambda branch, name: branch.__setitem__(name, 1))
    with pytest.raises(UserError, match=rf"^the record has the field {path}, which this version does not know$"):
        from_json(Whole, record)


@pytest.mark.parametrize("path", ["network", "stage1.latent", "tower.transformer.width", "parts.0.widths"])
def test_a_field_that_is_missing_is_refused_by_its_path(path: str) -> None:
    record = changed(to_json(WHOLE), path, lambda branch, name: branch.__delitem__(name))
    with pytest.raises(UserError, match=rf"^the record lacks the field {path}$"):
        from_json(Whole, record)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("scale", "0.5", "float or None"),
        ("scale", True, "float or None"),
        ("tower.patch_size", 2.5, "int"),
        ("tower", 3, "VisionTransformer or None"),
        ("tower.transformer", None, "Transformer"),
        ("network", None, "UNet or DiT"),
        ("mode", "three", "'one' or 'two'"),
        ("size", [3], r"tuple\[int, str\] or None"),
        ("size", [3, 4], None),
        ("rates", "head", r"tuple\[tuple\[str, float\], ...\]"),
        ("rates.1.1", "fast", "float"),
        ("parts.0.widths.1", None, "int"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_path(path: str, value: Any, wanted: str | None) -> None:
    record = changed(to_json(WHOLE), path, lambda branch, name: branch.__setitem__(name, value))
    message = r"size\.1 is 4: it must be str" if wanted is None else rf"{path} is .*: it must be {wanted}"
    with pytest.raises(UserError, match=f"^{message}$"):
        from_json(Whole, record)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(UserError, match=r"^scale is 'large': it must be float or None$"):
        to_json(replace(WHOLE, scale="large"))
    with pytest.raises(UserError, match=r"^tower is DiT: it must be VisionTransformer or None$"):
        to_json(replace(WHOLE, tower=WHOLE.network))
    with pytest.raises(UserError, match=r"test_records\.Whole is no configuration of vlm_jax, so that a run's record"):
        to_json(replace(WHOLE, stage1=WHOLE))


@pytest.mark.parametrize(
    "name",
    ["models.vea.Config", "models.vae.Confg", "models.vae.build", "nn.denoiser.UNet", "os.path", "Config", "", 3],
)
def test_a_name_that_is_none_of_a_configuration_is_refused(name: Any) -> None:
    """Also one that a file only imports: there is one name for each."""
    record = changed(to_json(WHOLE), "stage1.is", lambda branch, last: branch.__setitem__(last, name))
    with pytest.raises(UserError, match=rf"^stage1\.is is '{name}': this version of vlm_jax has no such configuration"):
        from_json(Whole, record)


def test_a_part_must_be_of_a_kind_that_its_place_takes() -> None:
    for record in (to_json(WHOLE) | {"network": {"is": "models.vae.Config"}}, to_json(WHOLE) | {"network": {}}):
        with pytest.raises(UserError, match=r"^network\.is is '.*': it must be one of nn\.unet\.UNet, nn\.dit\.DiT$"):
            from_json(Whole, record)


def test_what_a_configuration_refuses_is_refused_as_it_is_read() -> None:
    record = changed(to_json(WHOLE), "tower.transformer.heads", lambda branch, name: branch.__setitem__(name, 3))
    with pytest.raises(UserError, match="cannot be split into 3 heads"):
        from_json(Whole, record)

"""What a run takes from another: compared in its settings, laid as it is here, and bit-equal; all else is refused."""

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallest import CLIP, CONFIGS, TRANSFORMER
from vlm_jax.contract import abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.models import build
from vlm_jax.nn.vision import VisionTower, VisionTransformer
from vlm_jax.start import Start, check_configs, reads_tokens, resized, taken
from vlm_jax.trees import leaves_by_path

IMAGE = CLIP.image
ALL = Start(workdir="runs/old")
TEXT = replace(ALL, take="text", into="text")


@dataclass(frozen=True)
class Seeing:
    """The settings of a model that sees by a tower of CLIP's."""

    vision: VisionTransformer


INTO_VISION = replace(ALL, take="image", into="vision")


def abstract(config: Any) -> Any:
    model = build(config)
    return jax.eval_shape(model.init, jax.random.key(0), abstract_batch(model.inputs, 2))


def numbers(tree: Any) -> Any:
    """Arrays of these shapes, no two alike."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), tree)


VARIABLES = numbers(abstract(CLIP))


def seeing(config: VisionTransformer) -> Any:
    """The variables of a `Seeing`, as shapes: those of the tower, and a head."""
    image = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, config.channels), jnp.float32)
    params = jax.eval_shape(VisionTower(config).init, jax.random.key(0), image)["params"]
    return {"params": {"vision": params, "head": jax.ShapeDtypeStruct((8, 3), jnp.float32)}}


@pytest.mark.parametrize("name", ["clip", "flow", "kde", "vae"])
def test_all_of_a_model_is_all_of_it_collections_too(name: str) -> None:
    config = CONFIGS[name]
    variables = numbers(abstract(config))
    check_configs(ALL, config, config)
    given, told = taken(ALL, config, variables, config, abstract(config))
    assert given.keys() == leaves_by_path(variables).keys() and told == []
    for path, leaf in leaves_by_path(variables).items():
        np.testing.assert_array_equal(given[path], leaf, err_msg=path)


def test_a_part_becomes_a_part_of_another_name_and_nothing_else() -> None:
    check_configs(INTO_VISION, CLIP, Seeing(IMAGE))
    given, _ = taken(INTO_VISION, CLIP, VARIABLES, Seeing(IMAGE), seeing(IMAGE))
    expected = {f"params/vision/{path}": leaf for path, leaf in leaves_by_path(VARIABLES["params"]["image"]).items()}
    assert given.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(given[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-6}, r"\(vision\.transformer\.norm_eps: 0\.25 -> 1e-06\): give this run the settings"),
        ({"activation": "quick_gelu"}, r"\(vision\.transformer\.activation: gelu_tanh -> quick_gelu\)"),
        ({"heads": 4}, r"\(vision\.transformer\.heads: 2 -> 4\)"),
        ({"width": 16, "mlp": 4}, r"vision\.transformer\.mlp: 8 -> 4; .*|vision\.transformer\.width: 8 -> 16; .*"),
    ],
)
def test_another_function_of_the_same_shapes_is_refused_by_the_setting(changes: dict, message: str) -> None:
    other = Seeing(replace(IMAGE, transformer=replace(TRANSFORMER, **changes)))
    with pytest.raises(UserError, match=message):
        check_configs(INTO_VISION, CLIP, other)


def test_a_tower_of_other_pixels_is_another_function() -> None:
    other = Seeing(replace(IMAGE, std=(0.25,)))
    with pytest.raises(UserError, match=r"\(vision\.std: \(0\.5,\) -> \(0\.25,\)\)"):
        check_configs(INTO_VISION, CLIP, other)


def test_settings_of_how_a_function_is_computed_or_trained_may_differ() -> None:
    how = replace(TRANSFORMER, scan=True, remat="all", dtype="bfloat16", dropout=0.1)
    check_configs(INTO_VISION, CLIP, Seeing(replace(IMAGE, transformer=how)))


@pytest.mark.parametrize(
    ("start", "config", "message"),
    [
        (ALL, CONFIGS["vae"], r"model: vlm_jax\.models\.clip\.Config -> vlm_jax\.models\.vae\.Config"),
        (replace(ALL, take="image", into="text"), CLIP, r"text: \S+VisionTransformer -> \S+"),
        (
            replace(ALL, take="image", into="lm"),
            CLIP,
            "nothing in the configuration of runs/old describes image, .*|.*lm",
        ),
    ],
)
def test_a_part_is_not_taken_for_another(start: Start, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_configs(start, CLIP, config)


@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_stacked_or_taken_apart_and_compute_the_same(scan: bool) -> None:
    deep = replace(IMAGE, transformer=replace(TRANSFORMER, depth=3))
    here, there = (replace(deep, transformer=replace(deep.transformer, scan=s)) for s in (scan, not scan))
    old, new = replace(CLIP, image=there), Seeing(here)
    variables = numbers(abstract(old))
    check_configs(INTO_VISION, old, new)
    given, _ = taken(INTO_VISION, old, variables, new, seeing(here))
    shapes = leaves_by_path(seeing(here)["params"]["vision"])
    assert {path.removeprefix("params/vision/") for path in given} == shapes.keys()
    params: dict = {}
    for path, leaf in given.items():
        branch = params
        *parents, name = path.removeprefix("params/vision/").split("/")
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    image = jax.random.normal(jax.random.key(1), (2, 2, 2, 3))
    expected = jax.jit(VisionTower(there).apply)({"params": variables["params"]["image"]}, image)
    np.testing.assert_allclose(jax.jit(VisionTower(here).apply)({"params": params}, image), expected, rtol=1e-5)


def test_positions_of_another_resolution_are_resized_and_said_so() -> None:
    larger = replace(IMAGE, image_size=4)
    check_configs(INTO_VISION, CLIP, Seeing(larger))
    given, told = taken(INTO_VISION, CLIP, VARIABLES, Seeing(larger), seeing(larger))
    assert told == ["vision/position is resized from 2x2 to 4x4 positions"]
    table, before = given["params/vision/position"], VARIABLES["params"]["image"]["position"]
    assert table.shape == (1, 17, 8)
    np.testing.assert_array_equal(table[:, 0], before[:, 0])


def test_a_larger_vocabulary_has_the_mean_token_for_each_new_one_and_a_smaller_one_is_refused() -> None:
    """A decoder's context, which is in no shape, may be another."""
    config = CONFIGS["language"]
    variables, larger = numbers(abstract(config)), replace(config, vocab_size=8, context_length=9)
    check_configs(ALL, config, larger)
    given, told = taken(ALL, config, variables, larger, abstract(larger))
    assert len(told) == 2 and told[1].startswith("token/embedding grows from 6 to 8 tokens")
    for name in ("token", "head"):
        table, before = given[f"params/{name}/embedding"], variables["params"][name]["embedding"]
        np.testing.assert_array_equal(table[:6], before)
        np.testing.assert_allclose(table[6:], [before.mean(axis=0)] * 2, rtol=1e-5, atol=1e-6)
    smaller = replace(config, vocab_size=5)
    with pytest.raises(UserError, match=r"head/embedding is float32\[6, 8\] in runs/old and float32\[5, 8\] here"):
        taken(ALL, config, variables, smaller, abstract(smaller))


def test_a_plane_of_positions_stays_one_and_half_of_them_are_means() -> None:
    """Bicubic interpolation reproduces planes away from the edges; with antialiasing no position is passed over."""
    x = jnp.arange(8.0)
    plane = (x[:, None] + 10 * x).reshape(1, 64, 1)
    double = np.asarray(resized(plane, 8, 16)).reshape(16, 16)
    middle = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(double[4:12, 4:12], (middle[:, None] + 10 * middle)[4:12, 4:12], rtol=1e-4)
    np.testing.assert_array_equal(resized(plane, 8, 8), plane)
    spike = jnp.zeros((8, 8)).at[3, 3].set(1).reshape(1, 64, 1)
    np.testing.assert_allclose(jnp.sum(resized(spike, 8, 4)), 1 / 4, rtol=0.1)


def test_what_is_left_is_drawn_and_may_have_another_size() -> None:
    wide = replace(CLIP, embedding=16)
    with pytest.raises(UserError, match=r"\(embedding: 8 -> 16\)"):
        check_configs(ALL, CLIP, wide)
    start = replace(ALL, leave=("projection/kernel$",))
    check_configs(start, CLIP, wide)
    given, _ = taken(start, CLIP, VARIABLES, wide, abstract(wide))
    left = abstract(wide)["params"].keys() and {
        path for path in leaves_by_path(abstract(wide)) if path.endswith("projection/kernel")
    }
    assert given.keys() == leaves_by_path(abstract(wide)).keys() - left and len(left) == 2
    with pytest.raises(UserError, match=r"image_projection/kernel is float32\[8, 8\] in runs/old and float32\[8, 16\]"):
        taken(replace(start, leave=("text/projection",)), CLIP, VARIABLES, wide, abstract(wide))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (replace(ALL, take="vision", into="image"), "runs/old has no part vision: correct start.take"),
        (replace(ALL, take="image", into="vision"), "this run's model has no part vision: correct start.into"),
        (replace(ALL, leave=("heads$",)), "start.leave names heads\\$, which no path matches"),
        (replace(ALL, take="image", into="text"), "this run's model has no text/class_token, which runs/old has"),
        (replace(ALL, take="image/transformer", into="image"), "this run's model has no image/block_0/"),
    ],
)
def test_parts_and_paths_that_are_not_there_are_refused(start: Start, message: str) -> None:
    with pytest.raises(UserError, match=message):
        taken(start, CLIP, VARIABLES, CLIP, abstract(CLIP))


def test_what_has_no_place_is_refused_until_it_is_left() -> None:
    places = abstract(CLIP)
    del places["params"]["log_scale"]
    with pytest.raises(UserError, match=r"this run's model has no log_scale, which runs/old has"):
        taken(ALL, CLIP, VARIABLES, CLIP, places)
    given, _ = taken(replace(ALL, leave=("^log_scale$",)), CLIP, VARIABLES, CLIP, places)
    assert given.keys() == leaves_by_path(places).keys()


def test_a_frozen_place_of_half_the_bits_takes_rounded_values() -> None:
    places = seeing(IMAGE)
    places["params"]["vision"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), places["params"]["vision"]
    )
    given, _ = taken(INTO_VISION, CLIP, VARIABLES, Seeing(IMAGE), places)
    for path, leaf in leaves_by_path(VARIABLES["params"]["image"]).items():
        np.testing.assert_array_equal(given[f"params/vision/{path}"], leaf.astype(jnp.bfloat16))


def test_only_what_has_a_vocabulary_reads_tokens() -> None:
    assert reads_tokens(CLIP) and reads_tokens(CLIP.text)
    assert not reads_tokens(CLIP.image) and not reads_tokens(CONFIGS["vae"]) and not reads_tokens(None)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("start.leave '(' is not a regular expression")):
        Start(workdir="runs/old", leave=("(",))

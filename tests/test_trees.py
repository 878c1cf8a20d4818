"""Trees by path: what is taken apart is put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.trees import count_parameters, leaves_by_path, map_with_path, merge, part, partition

TREE = {
    "vision": {"block": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "position": np.ones(5)},
    "lm": {"kernel": np.ones((4, 4))},
    "log_scale": np.ones(()),
}
PATHS = ["lm/kernel", "log_scale", "vision/block/bias", "vision/block/kernel", "vision/position"]


def test_leaves_are_named_by_their_path():
    assert sorted(leaves_by_path(TREE)) == PATHS
    assert leaves_by_path(TREE)["vision/block/kernel"] is TREE["vision"]["block"]["kernel"]
    assert list(leaves_by_path({"layers": [np.ones(1), np.ones(2)]})) == ["layers/0", "layers/1"]


def test_a_part_of_variables_is_its_subtree_of_each_collection_that_has_one():
    variables = {"params": TREE, "constants": {"vision": {"order": 1}}, "data": {"image": 2}}
    assert part(variables, "vision") == {"params": TREE["vision"], "constants": {"order": 1}}
    assert part(variables, "lm") == {"params": TREE["lm"]}
    assert part(variables, "nowhere") == {}


def test_mapping_sees_each_path_and_leaf():
    mapped = map_with_path(lambda path, leaf: (path, leaf.size), TREE)
    assert mapped["vision"]["block"] == {"kernel": ("vision/block/kernel", 6), "bias": ("vision/block/bias", 3)}
    assert mapped["log_scale"] == ("log_scale", 1)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), []),
        (("nowhere",), []),
        (("^vision/",), ["vision/block/bias", "vision/block/kernel", "vision/position"]),
        (("kernel$", "^log"), ["lm/kernel", "log_scale", "vision/block/kernel"]),
        (("",), PATHS),
    ],
)
def test_a_partition_has_the_matching_leaves_and_merging_undoes_it(patterns: tuple[str, ...], expected: list[str]):
    matching, others = partition(TREE, patterns)
    assert sorted(leaves_by_path(matching)) == expected
    assert sorted(leaves_by_path(others)) == [path for path in PATHS if path not in expected]
    for merged in (merge(matching, others), merge(others, matching)):
        assert jax.tree.structure(merged) == jax.tree.structure(TREE)
        assert all(leaf is leaves_by_path(TREE)[path] for path, leaf in leaves_by_path(merged).items())


def test_a_part_has_no_empty_branch():
    matching, others = partition(TREE, ("^vision/block",))
    assert matching.keys() == {"vision"} and matching["vision"].keys() == {"block"}
    assert others["vision"].keys() == {"position"}
    assert partition({}, ("x",)) == ({}, {})


def test_parameters_are_counted_in_arrays_and_shapes_alike():
    assert count_parameters(TREE) == 6 + 3 + 5 + 16 + 1
    assert count_parameters(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))) == count_parameters(TREE)
    assert count_parameters({}) == 0

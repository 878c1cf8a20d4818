"""What is counted in a compiled program, on eight devices of the CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tools.compile_report import chips, collectives, result_bytes
from vlm_jax.errors import UserError
from vlm_jax.sharding import MeshShape, make_mesh


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    """Five all-reduces of float32 [4, 6] over all devices and one of a scalar; one all-gather to float32 [16]."""

    def part(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, _ = jax.lax.scan(lambda carry, _: (jnp.sin(jax.lax.psum(carry, "data")), None), x, length=5)
        return jax.lax.psum(jnp.sum(total), "data"), jax.lax.all_gather(y, "data", tiled=True)

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        part, mesh=make_mesh(MeshShape()), in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=False
    )
    times, sizes = collectives(jax.jit(mapped).lower(jnp.ones((4, 6)), jnp.ones(16)).compile().as_text())
    assert (times["all-reduce"], sizes["all-reduce"]) == (6, 5 * 4 * 6 * 4 + 4)
    assert (times["all-gather"], sizes["all-gather"]) == (1, 16 * 4)


def test_what_follows_a_kernel_with_lines_of_its_own_is_counted_too():
    program = """
%body (x: f32[4]) -> f32[4] {
  %kernel = f32[4] custom-call(%x), kernel_metadata={
"block": 384
}}, metadata={}
  ROOT %sum = f32[4] all-reduce(%kernel)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %call = f32[4] fusion(%x), calls=%body
}
"""
    times, sizes = collectives(program)
    assert (times, sizes) == ({"all-reduce": 1}, {"all-reduce": 16})


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("bf16[4,8]{1,0:T(8,128)(2,1)}", 64), ("(f32[2]{0}, s8[3,5]{1,0}, /*index=2*/bf16[1])", 25)],
)
def test_the_bytes_of_a_shape(shape: str, size: int):
    assert result_bytes(shape) == size


def test_an_unknown_topology_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"nothing can be compiled for --topology v9z:2x2 .*pip install -e '.\[tpu\]'"):
        chips("v9z:2x2")

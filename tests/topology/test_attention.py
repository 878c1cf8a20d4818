"""Fused attention in programs that libtpu compiles for chips that are not here (extra `tpu`)."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from vlm_jax.nn.transformer import TRANSFORMER_RULES, Transformer, TransformerStack
from vlm_jax.sharding import MeshShape, batch_sharding, make_mesh, parameter_shardings, placed


@pytest.mark.parametrize(("length", "width", "causal"), [(197, 128, False), (256, 144, False), (1024, 128, True)])
def test_the_kernel_compiles_for_a_v5e_in_a_stack_that_is_scanned_and_rematerialised(length, width, causal):
    """Heads of 64 and of 72 features, over a mesh that splits examples, parameters and heads."""
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2), devices)
    config = Transformer(width=width, depth=2, heads=2, mlp=256, dtype="bfloat16", scan=True, remat="all")
    stack = TransformerStack(config)

    def loss(params, x):
        return jnp.mean(stack.apply({"params": params}, x, causal=causal)[0].astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((8, length, width), jnp.float32, sharding=batch_sharding(mesh))
    params = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
    with jax.set_mesh(mesh):
        params = placed(params, parameter_shardings(params, TRANSFORMER_RULES, mesh))
        program = jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) >= 3  # forward, forward again, backward
    padded = -(-length // 128) * 128
    assert all(f"bf16[2,1,{padded},{width // 2}]" in call for call in calls)
    assert f"f32[2,1,{length},{length}]" not in program

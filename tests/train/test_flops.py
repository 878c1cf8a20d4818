"""FLOPs counted in the jaxpr: against closed forms, against XLA where it counts right, and as invariances."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from smallest import VAE
from vlm_jax.contract import Aux, Input, Model, abstract_batch
from vlm_jax.models import autoregressive, vae
from vlm_jax.models import build as build_model
from vlm_jax.nn.stack import Remat
from vlm_jax.nn.transformer import Transformer, TransformerStack
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.flops import count_flops, model_flops
from vlm_jax.train.step import eval_variables, init_train_state, make_train_step
from vlm_jax.trees import count_parameters, leaves_by_path


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_takes_two_flops_a_multiply_add() -> None:
    assert count_flops(jnp.matmul, abstract(3, 5), abstract(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(jnp.matmul, abstract(11, 3, 5), abstract(11, 5, 7)) == 11 * 2 * 3 * 5 * 7
    assert count_flops(partial(jnp.einsum, "bhtd,bhsd->bhts"), abstract(2, 3, 5, 7), abstract(2, 3, 11, 7)) == (
        2 * 2 * 3 * 5 * 11 * 7
    )
    assert count_flops(lambda x: jnp.exp(x) + x, abstract(3, 5)) == 0


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "valid": {"window_strides": (1, 1), "padding": "VALID"},
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 3), "padding": "SAME"},
    "grouped": {"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 2},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": [(2, 1), (1, 2)], "lhs_dilation": (2, 2)},
}


def convolution(settings: dict[str, Any]) -> tuple[Callable[..., jax.Array], jax.ShapeDtypeStruct, Any]:
    convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)
    return convolve, abstract(2, 8, 9, 4), abstract(3, 2, 4 // settings.get("feature_group_count", 1), 6)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_as_xla_counts_them(name: str) -> None:
    convolve, image, kernel = convolution(CONVOLUTIONS[name])
    cost = jax.jit(convolve).lower(image, kernel).cost_analysis()
    assert count_flops(convolve, image, kernel) == cost["flops"]


def test_a_convolution_without_padding_has_its_closed_form() -> None:
    convolve, image, kernel = convolution(CONVOLUTIONS["valid"])
    assert count_flops(convolve, image, kernel) == 2 * (2 * 6 * 8 * 6) * (3 * 2 * 4)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolutions_gradient_takes_twice_its_forward_pass(name: str) -> None:
    convolve, image, kernel = convolution(CONVOLUTIONS[name])

    def loss(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(convolve(image, kernel) ** 2)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    assert count_flops(gradient, image, kernel) == 3 * count_flops(convolve, image, kernel)


def test_a_scan_counts_as_the_same_layers_unrolled() -> None:
    def scanned(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    def unrolled(x: jax.Array, kernels: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return x

    x, kernels = abstract(3, 8), abstract(5, 8, 8)
    assert count_flops(scanned, x, kernels) == count_flops(unrolled, x, kernels) == 5 * 2 * 3 * 8 * 8

    def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda x, kernels: jnp.sum(function(x, kernels)), argnums=(0, 1))

    assert count_flops(gradient(scanned), x, kernels) == count_flops(gradient(unrolled), x, kernels)


def test_a_jitted_function_counts_as_the_function() -> None:
    assert count_flops(jax.jit(jnp.matmul), abstract(3, 5), abstract(5, 7)) == 2 * 3 * 5 * 7


def test_of_branches_the_dearest_counts() -> None:
    def branch(flag: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(flag, lambda: x @ x @ x, lambda: x @ x)

    assert count_flops(branch, jax.ShapeDtypeStruct((), jnp.bool_), abstract(4, 4)) == 2 * 2 * 4**3


def test_what_no_output_depends_on_does_not_count() -> None:
    def wasteful(x: jax.Array) -> jax.Array:
        x @ x
        return x

    assert count_flops(wasteful, abstract(4, 4)) == 0


def test_a_shard_mapped_body_counts_once_a_device_that_has_its_own_part() -> None:
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    rows = PartitionSpec("data")
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, axis_names={"data"}
    )
    with jax.set_mesh(mesh):
        assert count_flops(product, abstract(8, 5), abstract(5, 7)) == 2 * 8 * 5 * 7


def test_the_count_is_that_of_any_device_whose_mesh_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's mesh is set where the count, which is of CPUs, is taken: here of CPUs that have another name."""
    model = build_model(VAE)
    batch = abstract_batch(model.inputs, jax.device_count())
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    expected = model_flops(model, variables, batch)
    named = partial(jax.sharding.AbstractDevice, device_kind="another")
    monkeypatch.setattr(jax.sharding, "AbstractDevice", lambda device_kind, **kinds: named(**kinds))
    with jax.set_mesh(make_mesh(MeshShape())):
        assert model_flops(model, variables, batch) == expected
        placed = model.init(jax.random.key(0), jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), batch))
        assert model_flops(model, placed, batch) == expected


def test_a_loop_of_unknown_length_is_refused_only_where_it_has_flops() -> None:
    def loop(body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, body, x)

    assert count_flops(loop(lambda x: 2 * x), abstract(4, 4)) == 0
    with pytest.raises(ValueError, match="while loop are unknown: loop with scan"):
        count_flops(loop(lambda x: x @ x), abstract(4, 4))


def test_a_kernel_that_hides_its_work_is_refused() -> None:
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(ValueError, match="the FLOPs of ragged_dot_general cannot be read"):
        count_flops(jax.lax.ragged_dot, abstract(6, 5), abstract(2, 5, 7), sizes)


WIDTH, DEPTH, HIDDEN, LENGTH, BATCH = 16, 2, 40, 6, 2


def stack_flops() -> int:
    """The closed form: 2 x parameters of the products x tokens, and q k^T and its product with v."""
    parameters = DEPTH * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    return 2 * parameters * BATCH * LENGTH + DEPTH * 4 * BATCH * LENGTH**2 * WIDTH


@pytest.mark.parametrize("scan", [False, True])
def test_a_transformer_has_its_closed_form(scan: bool) -> None:
    stack = TransformerStack(Transformer(width=WIDTH, depth=DEPTH, heads=4, mlp=HIDDEN, scan=scan))
    x = abstract(BATCH, LENGTH, WIDTH)
    params = jax.eval_shape(stack.init, jax.random.key(0), x)
    kernels = {path: leaf for path, leaf in leaves_by_path(params).items() if path.endswith("kernel")}
    tokens = BATCH * LENGTH
    attention = DEPTH * 4 * BATCH * LENGTH**2 * WIDTH
    counted = count_flops(lambda params, x: stack.apply(params, x)[0], params, x)
    assert counted == 2 * count_parameters(kernels) * tokens + attention == stack_flops()


def count(model: Model, frozen: tuple[str, ...] = (), **settings: Any) -> tuple[int, int]:
    """Model and hardware FLOPs of a train step."""
    optimizer, key = optax.adam(1e-3), jax.random.key(0)
    batch = abstract_batch(model.inputs, BATCH)
    state = jax.eval_shape(partial(init_train_state, model, optimizer, frozen=frozen), key, batch)
    step = make_train_step(model, optimizer, **settings)
    return model_flops(model, eval_variables(state), batch, frozen), count_flops(step, state, batch, key)


def image_transformer(*, scan: bool, remat: Remat) -> Model:
    transformer = Transformer(width=WIDTH, depth=DEPTH, heads=4, mlp=HIDDEN, dropout=0.1, scan=scan, remat=remat)
    return build_model(autoregressive.Config(image_size=4, channels=1, levels=5, patch_size=2, transformer=transformer))


@pytest.mark.parametrize("scan", [False, True])
def test_rematerialisation_adds_hardware_flops_and_no_model_flops(scan: bool) -> None:
    plain = count(image_transformer(scan=scan, remat="none"))
    again = count(image_transformer(scan=scan, remat="all"))
    assert plain[0] == plain[1] == again[0]
    tokens = BATCH * 4
    block = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) * tokens + 4 * BATCH * 4**2 * WIDTH
    last = 2 * WIDTH * HIDDEN * tokens  # the backward pass does not need what a block's last product gave
    assert again[1] == plain[1] + DEPTH * (block - last)
    attention = 4 * BATCH * 4**2 * WIDTH  # its products alone have no parameters
    assert count(image_transformer(scan=scan, remat="products")) == (plain[0], plain[1] + DEPTH * attention)


def test_where_all_operands_depend_on_parameters_a_step_is_three_forward_passes() -> None:
    model = image_transformer(scan=True, remat="none")
    batch = abstract_batch(model.inputs, BATCH)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    forward = count_flops(lambda v, b: model.loss(v, b, jax.random.key(0), 0, train=True), variables, batch)
    assert count(model)[0] == 3 * forward


def test_a_convolutional_step_executes_its_model_flops_in_any_number_of_parts() -> None:
    model = build_model(vae.Config(image_size=8, channels=1, levels=5, latent=4, widths=(8, 16), dropout=0.1))
    whole, parts = count(model), count(model, micro_steps=2)
    assert whole[0] == whole[1] == parts[0] == parts[1]


def two_layers() -> Model:
    """x [B, 3] -> [B, 5] -> [B, 7]"""

    def init(key: jax.Array, batch: Any) -> Any:
        return {"params": {"first": jnp.ones((3, 5)), "second": jnp.ones((5, 7))}}

    def loss(variables: Any, batch: Any, key: jax.Array, step: jax.Array, *, train: bool) -> Any:
        params = variables["params"]
        hidden = jnp.tanh(batch["x"] @ params["first"])
        # A metric whose derivative nobody asks for must not count as trained.
        metrics = {"gram": jnp.sum(hidden @ hidden.T)}
        return jnp.mean((hidden @ params["second"]) ** 2), Aux(metrics, weight=jnp.float32(BATCH))

    return Model(inputs={"x": Input((3,), "float32")}, init=init, loss=loss, rules=())


FIRST, SECOND, GRAM = 2 * BATCH * 3 * 5, 2 * BATCH * 5 * 7, 2 * BATCH * 5 * BATCH


@pytest.mark.parametrize(
    ("frozen", "flops"),
    [
        ((), 2 * FIRST + 3 * SECOND),  # no gradient flows into the data
        (("first",), FIRST + 2 * SECOND),
        (("second",), 2 * FIRST + 2 * SECOND),
    ],
)
def test_frozen_parameters_cost_their_forward_pass_and_what_flows_through_them(
    frozen: tuple[str, ...], flops: int
) -> None:
    assert count(two_layers(), frozen) == (flops + GRAM, flops + GRAM)

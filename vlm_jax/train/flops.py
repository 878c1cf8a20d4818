"""FLOPs of a function, counted in its jaxpr; XLA's own cost analysis counts the body of a scan once.

Matrix products and convolutions count, two FLOPs a multiply-add; elementwise work, which memory bounds, does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from vlm_jax.contract import Model
from vlm_jax.trees import merge, partition

PyTree = Any


def count_flops(function: Callable[..., Any], *args: PyTree) -> int:
    """FLOPs of one call, over all devices: of what the outputs depend on, each branch taken to be the dearest.

    Nothing is executed. The partitioner's duplicates, where a mesh axis computes the same on several devices, do not
    count; what `jax.checkpoint` computes again does. Fused attention, which hides its work, counts as its formula.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: FLOPs in a loop of unknown length, or a kernel whose work its jaxpr does not tell.
    """
    cpu = jax.sharding.AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")  # it has no such kernels
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=cpu)):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, True)
    return jaxpr_flops(jaxpr)


def model_flops(
    model: Model, variables: Mapping[str, PyTree], batch: Mapping[str, PyTree], frozen: Sequence[str] = ()
) -> int:
    """FLOPs that a gradient of the model's loss takes at the least, whatever the implementation computes again.

    These are the model FLOPs of PaLM (2204.02311, appendix B), by which MFU is defined: the forward pass, and for
    each of its products another one for each operand that a live parameter influences. That is three times the
    forward pass where all parameters train, less where some are frozen or the data enter.

    Args:
      variables, batch: arrays or `jax.ShapeDtypeStruct`.
      frozen: regular expressions of the paths of parameters that do not train.

    Raises:
      ValueError: as `count_flops`.
      TypeError: the loss has a `jax.custom_vjp`, which hides its derivative.
    """
    variables = dict(variables)
    still, live = partition(variables.pop("params"), frozen)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def derivative(
        live: PyTree, tangents: PyTree, still: PyTree, collections: PyTree, batch: PyTree, key: jax.Array
    ) -> PyTree:
        def loss(live: PyTree) -> PyTree:
            return model.loss({"params": merge(live, still), **collections}, batch, key, np.int32(0), train=True)

        return jax.jvp(loss, (live,), (tangents,), has_aux=True)

    # The gradient is the transpose of the forward-mode derivative, and a transpose has the products of its original.
    # Forward mode never computes anything again, so it is counted in the gradient's place.
    return count_flops(derivative, live, live, still, variables, batch, key)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of a jaxpr's equations and of those within them."""
    return sum(map(equation_flops, jaxpr.eqns))


def equation_flops(equation: core.JaxprEqn) -> int:
    """FLOPs of one equation."""
    params = equation.params
    inner = [jaxpr_flops(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    match equation.primitive.name:
        case "dot_general":
            return dot_flops(equation)
        case "conv_general_dilated":
            return convolution_flops(equation)
        case "scan":
            return params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "shard_map":
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
        case "while" if any(inner):
            raise ValueError("the FLOPs of a while loop are unknown: loop with scan, or with fori_loop to a fixed end")
        case "pallas_call" | "ragged_dot_general" as name:
            raise ValueError(f"the FLOPs of {name} cannot be read from its jaxpr: count a version without it")
        case _:
            return sum(inner)


def dot_flops(equation: core.JaxprEqn) -> int:
    """Each element of the result is a sum over the contracted dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = shape(equation.invars[0]), shape(equation.outvars[0])
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def convolution_flops(equation: core.JaxprEqn) -> int:
    """Multiplications by the zeros of padding and dilation do not count, so that a gradient's FLOPs are its forward's.

    This is how XLA counts them.
    """
    params = equation.params
    # Each array's axes: batch or output features, then features or input features of a group, then space.
    left, right, result = (
        [shape(atom)[axis] for axis in axes]
        for atom, axes in zip((*equation.invars, *equation.outvars), params["dimension_numbers"], strict=True)
    )
    total = 2 * result[0] * result[1] * right[1]
    for i, (pixels, window, outputs) in enumerate(zip(left[2:], right[2:], result[2:], strict=True)):
        start = np.arange(outputs)[:, None] * params["window_strides"][i] - params["padding"][i][0]
        position, dilation = start + np.arange(window) * params["rhs_dilation"][i], params["lhs_dilation"][i]
        inside = (position >= 0) & (position <= (pixels - 1) * dilation)
        total *= int(np.sum(inside & (position % dilation == 0)))
    return total


def shape(atom: Any) -> tuple[int, ...]:
    """Of a variable or literal of a jaxpr."""
    return atom.aval.shape

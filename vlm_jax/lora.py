"""LoRA (2106.09685): a model of any family with adapters of low rank beside its kernels, which alone train.

A kernel W [in, out] counts as W + (alpha / rank) A B, with A [in, rank] and B [rank, out]. Parameters keep their
paths, and the adapters stand at `lora/PATH/a` and `lora/PATH/b`.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.contract import CAPABILITIES, Batch, Model, Rule, Variables, abstract_batch
from vlm_jax.errors import UserError, pattern_fault
from vlm_jax.sharding import batch_shards
from vlm_jax.trees import leaves_by_path, map_with_path, partition

LORA = "lora"
BASE = rf"^(?!{LORA}/)"
"""The paths of all that is no adapter: what a run freezes that trains these alone."""
KERNELS = r"(attention/(query|key|value|out)|mlp/(up|gate|down))/kernel$"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which kernels have an adapter, and of what rank."""

    rank: int | None = None
    """None: there are no adapters."""
    alpha: float = 16.0
    """The adapters' products count alpha / rank times, so that another rank needs no other learning rate."""
    pattern: str = KERNELS
    """Regular expression of the paths of the kernels; a head is best trained whole, by --frozen."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be at least 1, or None for no adapters")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}: it must be above 0")
        if fault := pattern_fault(self.pattern):
            raise UserError(f"lora.pattern {self.pattern!r} is no regular expression ({fault})")


def adapted(model: Model, config: LoRA) -> Model:
    """`model` with adapters, which change nothing until they have trained: A is normal and B is zero.

    A stack of kernels [layers, in, out], as a scan has it, has an adapter a layer. The kernel's gradient exists for as
    long as those of A and B are computed from it, a layer at a time under a scan.

    Args:
      config: with a rank.

    Raises:
      UserError: the pattern finds no kernel, or what is none.
    """
    assert config.rank is not None
    rank = config.rank
    kernels, rules = adapted_kernels(model, config)

    def init(key: jax.Array, batch: Batch) -> Variables:
        variables = model.init(key, batch)

        def adapter(path: str, kernel: Any) -> dict[str, jax.Array]:
            *layers, inputs, outputs = kernel.shape
            a = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), (*layers, inputs, rank))
            return {"a": a * inputs**-0.5, "b": jnp.zeros((*layers, rank, outputs))}

        return {**variables, "params": {**variables["params"], LORA: map_with_path(adapter, kernels)}}

    def with_merged(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda variables, *args, **options: function(merged(variables, config), *args, **options)

    functions = {name: getattr(model, name) for name in ("loss", *CAPABILITIES)}
    wrapped: dict[str, Any] = {name: with_merged(each) for name, each in functions.items() if each is not None}
    return replace(model, init=init, rules=(*rules, *model.rules), **wrapped)


def merged(variables: Variables, config: LoRA) -> dict[str, Any]:
    """The variables of the plain model that computes the same: each adapter is added to its kernel."""
    assert config.rank is not None
    scale = config.alpha / config.rank
    adapters = leaves_by_path(variables["params"][LORA])

    def kernel(path: str, leaf: jax.Array) -> jax.Array:
        # In the adapter's float32 also where the kernel, which is frozen, is kept in bfloat16: it would not notice.
        return leaf + scale * adapters[f"{path}/a"] @ adapters[f"{path}/b"] if f"{path}/a" in adapters else leaf

    base = without_adapters(variables)
    return {**base, "params": map_with_path(kernel, base["params"])}


def without_adapters(variables: Variables) -> dict[str, Any]:
    """Those of the base alone."""
    params = {name: branch for name, branch in variables["params"].items() if name != LORA}
    return {**variables, "params": params}


def adapted_kernels(model: Model, config: LoRA) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The shapes of the kernels that have an adapter, nested by their paths, and how the adapters lie on a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    batch = abstract_batch(model.inputs, 1 if mesh.empty else batch_shards(mesh))
    params = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    kernels, _ = partition(params, (config.pattern,))
    found = leaves_by_path(kernels)
    if not found:
        raise UserError(
            f"lora.pattern {config.pattern!r} is found in the path of no parameter: there are "
            f"{', '.join(sorted(leaves_by_path(params)))}"
        )
    if others := [f"{path} of shape {list(leaf.shape)}" for path, leaf in found.items() if leaf.ndim < 2]:
        raise UserError(f"lora.pattern {config.pattern!r} finds {others[0]}, which is no kernel: narrow it")
    return kernels, tuple(adapter_rules(model.rules, found))


def adapter_rules(rules: tuple[Rule, ...], kernels: Mapping[str, Any]) -> Iterator[Rule]:
    """An adapter lies as its kernel does, by the dimension that it keeps of it."""
    for path, kernel in kernels.items():
        axes = next((axes for pattern, axes in rules if re.search(pattern, path)), ())
        *layers, inputs, outputs = (None,) * (kernel.ndim - len(axes)) + tuple(axes)
        yield rf"^{LORA}/{re.escape(path)}/a$", (*layers, inputs, None)
        yield rf"^{LORA}/{re.escape(path)}/b$", (*layers, None, outputs)

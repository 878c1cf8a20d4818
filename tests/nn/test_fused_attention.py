"""Fused attention: its values beside the plain path, and the programs in which it stands, lowered on no device."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from vlm_jax.nn.attention import dot_product_attention, plain_attention
from vlm_jax.nn.fused_attention import pallas_attention
from vlm_jax.sharding import MESH_AXES, MeshShape, make_mesh, platform
from vlm_jax.train.flops import count_flops

TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
GPU = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
LOWERED = {"tpu": "tpu", "gpu": "cuda"}
KERNELS = ("tpu_custom_call", "__cudnn$fmhaSoftmaxBackward", "__cudnn$fmhaScaleBiasSoftmaxBackward")


@contextmanager
def compiling_for(device: AbstractDevice, *shape: int) -> Iterator[None]:
    mesh = AbstractMesh(shape or (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.fixture(autouse=True)
def _cudnn_that_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only running it takes the library: the program names what it calls."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def gradient(query: jax.Array, key: jax.Array, mask: jax.Array | None, causal: bool) -> tuple[jax.Array, ...]:
    y, pullback = jax.vjp(lambda *x: dot_product_attention(*x, mask, causal=causal), query, key, key)
    return pullback(y)


def lowered(
    device: AbstractDevice,
    query: tuple[int, ...],
    *mesh: int,
    context: int | None = None,
    heads: int | None = None,
    dtype: str = "bfloat16",
    masked: bool = False,
    causal: bool = False,
) -> str:
    """The program of attention's gradient, with so many `heads` of keys and values."""
    key = (query[0], context or query[1], heads or query[2], query[3])
    mask = jax.ShapeDtypeStruct((query[0], 1, query[1], key[1]), "bool") if masked else None
    with compiling_for(device, *mesh):
        traced = jax.jit(gradient, static_argnums=3).trace(
            jax.ShapeDtypeStruct(query, dtype), jax.ShapeDtypeStruct(key, dtype), mask, causal
        )
        return traced.lower(lowering_platforms=(LOWERED[device.platform],)).as_text()


def kernels(program: str) -> set[str]:
    return {kernel for kernel in KERNELS if kernel in program}


@pytest.mark.parametrize(
    ("length", "context", "heads", "causal"), [(130, 130, 2, True), (70, 130, 4, False), (130, 130, 1, True)]
)
def test_the_tpu_kernel_and_its_gradient_are_those_of_the_formula(length: int, context: int, heads: int, causal: bool):
    random = np.random.default_rng(0)
    query, probe = random.normal(size=(2, 1, length, 4, 8)).astype(np.float32)
    key, value = random.normal(size=(2, 1, context, heads, 8)).astype(np.float32)

    def outputs(attention, **settings):
        y, pullback = jax.vjp(lambda *x: attention(*x, causal=causal, **settings), query, key, value)
        return y, *pullback(probe)

    kernel = jax.jit(lambda: outputs(pallas_attention, interpret=True))()
    for actual, expected in zip(kernel, jax.jit(lambda: outputs(plain_attention))(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("device", "kernel"), [(TPU, KERNELS[0]), (GPU, KERNELS[1])], ids=["tpu", "gpu"])
def test_the_program_holds_a_kernel_and_no_logits(device: AbstractDevice, kernel: str, causal: bool):
    """At the length of a ViT-B/16, and at DiT-XL/2's width of heads."""
    for shape in [(2, 197, 2, 64), (2, 256, 2, 72)]:
        program = lowered(device, shape, causal=causal)
        assert kernels(program) == {kernel}
        assert f"{shape[1]}x{shape[1]}xf32" not in program


@pytest.mark.parametrize(("device", "kernel"), [(TPU, KERNELS[0]), (GPU, KERNELS[1])], ids=["tpu", "gpu"])
def test_a_kernel_reads_shared_keys_where_they_lie(device: AbstractDevice, kernel: str):
    program = lowered(device, (2, 256, 6, 64), heads=2, causal=True)
    assert kernels(program) == {kernel}
    calls = [line for line in program.splitlines() if kernel in line]
    keys = "2x2x256x64xbf16" if device is TPU else "2x256x2x64xbf16"
    assert calls and all(keys in call for call in calls)


@pytest.mark.parametrize("length", [197, 256])
def test_cudnn_takes_a_mask(length: int):
    program = lowered(GPU, (2, length, 2, 64), masked=True, causal=True)
    assert kernels(program) == {KERNELS[2]}
    assert f"{length}x{length}xf32" not in program


def test_a_kernel_sees_its_own_devices_examples_and_heads():
    program = lowered(TPU, (8, 256, 6, 64), 2, 2, 3)
    calls = [line for line in program.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 2  # forward and backward
    assert all("tensor<2x2x256x64xbf16>" in call and "tensor<8x" not in call for call in calls)


def test_a_kernel_has_copies_of_the_keys_that_the_mesh_cannot_split_with_the_queries():
    program = lowered(TPU, (8, 256, 6, 64), 2, 2, 3, heads=2)
    calls = [line for line in program.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 2  # forward and backward
    assert all("tensor<2x2x256x64xbf16>" in call and "tensor<2x1x256" not in call for call in calls)


@pytest.mark.parametrize(
    ("device", "query", "settings"),
    [
        (TPU, (2, 77, 2, 64), {}),
        (TPU, (2, 256, 2, 64), {"masked": True}),
        (TPU, (2, 1, 2, 64), {"context": 196}),
        (GPU, (2, 256, 2, 64), {"dtype": "float32"}),
        (GPU, (2, 256, 2, 12), {}),
        (GPU, (2, 256, 2, 136), {}),
        (GPU, (2, 1, 2, 64), {"context": 196}),
    ],
)
def test_what_a_kernel_cannot_take_is_left_to_the_formula(device, query, settings):
    assert not kernels(lowered(device, query, **settings))


@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 1, 4)])
def test_what_a_mesh_cannot_split_evenly_is_left_to_the_formula(mesh: tuple[int, ...]):
    assert not kernels(lowered(TPU, (6, 256, 6, 64), *mesh))


def test_the_platform_is_that_of_the_mesh_and_without_one_that_of_the_backend():
    assert platform() == "cpu"
    for device in (TPU, GPU):
        with compiling_for(device):
            assert platform() == device.platform
    with jax.set_mesh(make_mesh(MeshShape())):
        assert platform() == "cpu"


@pytest.mark.parametrize("device", [TPU, GPU], ids=["tpu", "gpu"])
def test_flops_are_counted_as_without_a_kernel(device: AbstractDevice):
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    product = 2 * 2 * 2 * 256**2 * 64
    with compiling_for(device):
        assert count_flops(lambda x: dot_product_attention(x, x, x), x) == 2 * product
        assert count_flops(lambda x: jax.jvp(lambda x: dot_product_attention(x, x, x), (x,), (x,)), x) == 6 * product

"""Fused attention: the kernels of cuDNN and of Pallas, which write no T x S logits, and when each can serve."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float

from vlm_jax.sharding import batch_shards, partition_spec, platform

Queries = Float[Array, "B T H d"]
Keys = Float[Array, "B S K d"]
"""And values: of K heads, each of which H / K neighbouring heads of queries share."""
Mask = Bool[Array, "#B #H T S"] | None

SHORTEST = 64
"""Tokens from which there is something to save: below, the logits are no larger than the keys."""
LANES = 128
"""The lengths that the TPU's kernel takes are multiples of this. What is shorter would be mostly padding: at 77 tokens
a v5e's program moves a third more bytes with the kernel than without, at 256 a third less."""


def fused_attention(query: Queries, key: Keys, value: Keys, mask: Mask, *, causal: bool) -> Queries | None:
    """`dot_product_attention` by a kernel of the platform that is compiled for; None: it has none for this case.

    The kernels read a shared head of keys and values where it lies, and have a derivative in reverse mode only.
    """
    length, heads, width = query.shape[1:]
    context = key.shape[1]
    match platform():
        case "gpu" if min(length, context) >= SHORTEST:
            if width % 8 == 0 and width <= 128 and query.dtype in (jnp.bfloat16, jnp.float16):
                return cudnn_attention(query, key, value, mask, causal=causal)
        case "tpu" if min(length, context) >= LANES and mask is None:
            kernel = partial(pallas_attention, causal=causal)
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                return kernel(query, key, value)
            if len(query) % batch_shards(mesh) == 0 and heads % mesh.shape["tensor"] == 0:
                # The partitioner cannot look into a kernel: left to itself it gathers all that the mesh had split.
                spec = partition_spec(["batch", None, "heads", None])
                kernel = jax.shard_map(kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
                return kernel(query, key, value)
    return None


def cudnn_attention(query: Queries, key: Keys, value: Keys, mask: Mask, *, causal: bool) -> Queries:
    """cuDNN's, whose derivative jax offers for even lengths only: what pads S is masked, what pads T is cut off."""
    length, context = query.shape[1], key.shape[1]
    lengths = {}
    if mask is not None:
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, length % 2), (0, context % 2)])
    elif context % 2:
        sizes = {"query_seq_lengths": length, "key_value_seq_lengths": context}
        lengths = {name: jnp.full(len(query), size, jnp.int32) for name, size in sizes.items()}
    query, key, value = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value))
    attention = partial(jax.nn.dot_product_attention, mask=mask, is_causal=causal, implementation="cudnn")
    return attention(query, key, value, **lengths)[:, :length]


def pallas_attention(query: Queries, key: Keys, value: Keys, *, causal: bool, interpret: bool = False) -> Queries:
    """Splash attention on one TPU; what pads S to whole blocks is masked, what pads T is cut off.

    Args:
      interpret: compute the same without a TPU, to test it.
    """
    length, context = query.shape[1], key.shape[1]
    rows, columns = (-(-size // LANES) * LANES for size in (length, context))
    shape = splash_attention.CausalMask if causal else splash_attention.FullMask
    q, kv = block(rows), block(columns)
    kernel = splash_attention.make_splash_mha_single_device(
        mask=splash_attention.MultiHeadMask([shape((rows, columns))] * query.shape[2]),
        block_sizes=splash_attention.BlockSizes(
            block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, use_fused_bwd_kernel=True
        ),
        interpret=interpret,
    )

    def heads_first(x: Array, size: int) -> Array:
        return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)])

    segments = None
    if columns > context:  # the padding is a segment of its own, to which no query belongs
        segments = splash_attention.SegmentIds(jnp.zeros(rows, int), (jnp.arange(columns) >= context).astype(int))
    query = heads_first(query * query.shape[-1] ** -0.5, rows)
    y = jax.vmap(kernel, (0, 0, 0, None))(query, heads_first(key, columns), heads_first(value, columns), segments)
    return y[:, :, :length].swapaxes(1, 2)


def block(size: int) -> int:
    """The largest tile up to 512, by which a multiple of 128 can be divided."""
    return max(tile for tile in range(LANES, 4 * LANES + 1, LANES) if size % tile == 0)

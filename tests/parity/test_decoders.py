"""Forward passes of the decoder are those of `transformers`' models, of the same random weights."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from vlm_jax.nn.decoder import Decoder, DecoderConfig, RotaryScaling
from vlm_jax.trees import leaves_by_path

LENGTH = 40
X = np.float32(np.random.default_rng(0).normal(size=(2, LENGTH, 32)))
PAD = np.array([0, 7])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 8}
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

MODELS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, {"rope_type": "default", "rope_theta": 10_000.0}, {}),
    "llama-3.1": (
        LlamaModel,
        LlamaConfig,
        {"rope_type": "llama3", "rope_theta": 500.0, **SCALING},
        {"rope_base": 500.0, "rope_scaling": RotaryScaling(factor=4.0, original_length=64)},
    ),
    "qwen2": (Qwen2Model, Qwen2Config, {"rope_type": "default", "rope_theta": 10_000.0}, {"qkv_bias": True}),
    "qwen3": (Qwen3Model, Qwen3Config, {"rope_type": "default", "rope_theta": 10_000.0}, {"qk_norm": "rms"}),
}
"""Of each the model and its configuration, its rotations, and what sets ours apart."""


def ours(theirs: torch.nn.Module, depth: int) -> dict[str, Any]:
    """Their weights by our names."""
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}

    def dense(name: str) -> dict[str, np.ndarray]:
        bias = {"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}
        return {"kernel": state[f"{name}.weight"].T, **bias}

    params: dict[str, Any] = {"final_norm": {"scale": state["norm.weight"]}}
    for i in range(depth):
        block = f"layers.{i}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        attention = {name: dense(f"{block}.self_attn.{theirs}") for name, theirs in names.items()}
        for name, their in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            if f"{block}.self_attn.{their}.weight" in state:
                attention[name] = {"scale": state[f"{block}.self_attn.{their}.weight"]}
        params[f"block_{i}"] = {
            "attention_norm": {"scale": state[f"{block}.input_layernorm.weight"]},
            "attention": attention,
            "mlp_norm": {"scale": state[f"{block}.post_attention_layernorm.weight"]},
            "mlp": {name: dense(f"{block}.mlp.{name}_proj") for name in ("gate", "up", "down")},
        }
    return params


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder(name: str):
    """Of texts of two lengths, the shorter padded on the left."""
    model, configuration, rotations, settings = MODELS[name]
    torch.manual_seed(0)
    theirs = model(
        configuration(
            **SIZES, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_parameters=rotations, pad_token_id=None
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = DecoderConfig(
        width=32, depth=2, heads=4, kv_heads=2, head_width=16, mlp=48, norm_eps=1e-5, scan=False, **settings
    )
    positions = np.maximum(np.arange(LENGTH) - PAD[:, None], 0).astype(np.int32)
    real = np.arange(LENGTH) >= PAD[:, None]
    params = ours(theirs, config.depth)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), X, positions)["params"]
    assert {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()} == {
        path: leaf.shape for path, leaf in leaves_by_path(params).items()
    }
    mask = np.broadcast_to(real[:, None, None], (2, 1, LENGTH, LENGTH))
    y, _ = jax.jit(lambda: Decoder(config).apply({"params": params}, X, positions, mask, causal=True))()
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=torch.from_numpy(X),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            position_ids=torch.from_numpy(positions.astype(np.int64)),
        ).last_hidden_state.numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=1e-4)

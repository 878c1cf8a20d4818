"""A preset beside another library's network of the same sizes, turn about in one process, on the CPU in float32.

Either a train step, on one batch over and over: forward pass, gradient, clipping and AdamW; or, of an autoregressive
transformer, the drawing of a batch of sequences with a cache. The peer is PyTorch as its users have it: eager, with
fused AdamW and scaled dot products, on as many threads as XLA takes.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoregressive, build, clip, diffusion, probability_flow, vdm
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.unet import UNet
from vlm_jax.train.optim import Optimizer, make_optimizer
from vlm_jax.train.plan import Training
from vlm_jax.train.step import init_train_state, make_train_step
from vlm_jax.trees import count_parameters

LIBRARIES = {"diffusers": "parity", "transformers": "parity", "open_clip": "open_clip"}
"""Library -> the extra that installs it."""

WARM_UP = 2


@dataclass(frozen=True)
class Contender:
    """One of the two."""

    parameters: int
    run: Callable[[], None]
    """Does the work once, all of it before it returns."""


def plain(config: Any) -> Any:
    """A configuration that computes in float32 and drops nothing, whatever the depth of the field that says so."""
    if not is_dataclass(config):
        return config
    changed = {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    changed |= {name: value for name, value in (("dtype", "float32"), ("dropout", 0.0)) if name in changed}
    return replace(config, **changed)  # type: ignore[type-var]


def check_peer(library: str, config: Any) -> None:
    """Refuses a preset that the library has no like of, a library that is not installed, and an accelerator."""
    text, image = isinstance(config, autoregressive.Config), isinstance(config, clip.Config)
    network = getattr(config, "network", None)
    contrastive = image and config.objective == "info_nce"
    if not {"diffusers": network is not None, "transformers": text or contrastive, "open_clip": contrastive}[library]:
        raise UserError(
            f"this preset has no peer in {library}: --against diffusers is for U-Nets and diffusion transformers, "
            f"transformers for autoregressive transformers and CLIP, and open_clip for CLIP"
        )
    if importlib.util.find_spec(library) is None:
        raise UserError(f"--against {library} needs an extra: run `pip install -e '.[{LIBRARIES[library]}]'`")
    if jax.default_backend() != "cpu":
        raise UserError("--against compares on the CPU alone: set the environment variable JAX_PLATFORMS=cpu")


def compare(
    experiment: Experiment, library: str, random_batch: Callable[[Mapping[str, Input], int, int], dict[str, np.ndarray]]
) -> dict[str, float | int | str]:
    """The least wall and CPU seconds of each over `training.steps` rounds, and theirs over ours: above 1 ours leads.

    Raises:
      UserError: of `check_peer`, or sizes that the peer cannot have, or another optimizer than AdamW at one rate.
    """
    config, training = plain(experiment.model), experiment.training
    check_peer(library, config)
    optimizer = training.optimizer
    if not isinstance(optimizer, Optimizer) or optimizer.multiples:
        raise UserError("the peers train by AdamW, all parameters at one rate: leave the optimizer's multiples out")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads of PyTorch must not spin while we compute
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(training.seed)
    batch_size, model = training.batch_size, build(config)
    batch = random_batch(model.inputs, batch_size, training.seed)
    if isinstance(config, autoregressive.Config):
        what, ours, theirs = "decoding", our_decoding(model, batch), gpt2(config, batch_size)
    else:
        what, ours = "train step", our_step(model, training, batch)
        if isinstance(config, clip.Config):
            theirs = (hugging_clip if library == "transformers" else open_clip)(config, optimizer, batch)
        else:
            theirs = diffuser(config, optimizer, batch)
    ours_least, theirs_least = alternate(ours.run, theirs.run, training.steps)
    results: dict[str, float | int | str] = {
        "against": library,
        "timed": what,
        "batch_size": batch_size,
        "parameters": ours.parameters,
        "peer/parameters": theirs.parameters,
    }
    for i, unit in enumerate(("seconds", "cpu_seconds")):
        results[f"{unit}_min"], results[f"peer/{unit}_min"] = ours_least[i], theirs_least[i]
        results[f"{unit}_ratio"] = theirs_least[i] / ours_least[i]
    if isinstance(config, autoregressive.Config):
        tokens = batch_size * positions(config)
        results["tokens_per_second"] = tokens / ours_least[0]
        results["peer/tokens_per_second"] = tokens / theirs_least[0]
    return results


def alternate(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> np.ndarray:
    """The least wall and CPU seconds of each: [2, 2]. Each round runs one after the other."""
    seconds = np.zeros((WARM_UP + rounds, 2, 2))
    for i in range(len(seconds)):
        for j, run in enumerate((ours, theirs)):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[i, j] = time.perf_counter() - wall, time.process_time() - cpu
    return seconds[WARM_UP:].min(axis=0)


def our_step(model: Model, training: Training, batch: dict[str, np.ndarray]) -> Contender:
    """The train step as training compiles it, on one device, without an average of the parameters."""
    optimizer, key = make_optimizer(training.optimizer, training.steps), jax.random.key(training.seed)
    arrays = jax.tree.map(jnp.asarray, batch)
    state = jax.jit(lambda key: init_train_state(model, optimizer, key, arrays))(key)
    step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)
    parameters = count_parameters(state.params)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, arrays, key)
        jax.block_until_ready((state, metrics))

    return Contender(parameters, run)


def our_decoding(model: Model, batch: dict[str, np.ndarray]) -> Contender:
    key = jax.random.key(0)
    variables = jax.jit(model.init)(key, batch)
    assert model.sample is not None
    draw = jax.jit(model.sample, static_argnames="num")
    num = len(batch["image"])
    return Contender(count_parameters(variables), lambda: jax.block_until_ready(draw(variables, key, {}, num=num)))


def torch_step(network: Any, config: Optimizer, loss: Callable[[], Any]) -> Contender:
    """PyTorch's step of the same optimizer."""
    import torch

    parameters = list(network.train().parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        config.learning_rate,
        (config.b1, config.b2),
        config.eps,
        config.weight_decay,
        fused=True,
    )

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()

    return Contender(sum(parameter.numel() for parameter in parameters), run)


def positions(config: autoregressive.Config) -> int:
    """Tokens of an image: patches, of which ours draws every sub-pixel, and GPT-2 one of as many words as levels."""
    return (config.image_size // config.patch_size) ** 2


def gpt2(config: autoregressive.Config, batch_size: int) -> Contender:
    """`generate` with its cache; a word more than there are levels begins each sequence."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    t, length, first = config.transformer, positions(config), config.levels
    peer = GPT2Config(
        n_embd=t.width,
        n_layer=t.depth,
        n_head=t.heads,
        n_inner=t.mlp,
        n_positions=length + 1,
        vocab_size=first + 1,
        bos_token_id=first,
        pad_token_id=0,
        eos_token_id=None,
    )
    network = GPT2LMHeadModel(peer).eval()
    start = torch.full((batch_size, 1), first)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length}

    @torch.inference_mode()
    def run() -> None:
        drawn = network.generate(start, attention_mask=torch.ones_like(start), **settings)
        assert drawn.shape == (batch_size, length + 1)

    return Contender(network.num_parameters(), run)


def hugging_clip(config: clip.Config, optimizer: Optimizer, batch: dict[str, np.ndarray]) -> Contender:
    import torch
    from transformers import CLIPConfig, CLIPModel

    def sizes(t: Any) -> dict[str, Any]:
        return {
            "hidden_size": t.width,
            "intermediate_size": t.mlp,
            "num_hidden_layers": t.depth,
            "num_attention_heads": t.heads,
            "hidden_act": {"gelu_tanh": "gelu_new"}.get(t.activation, t.activation),
            "layer_norm_eps": t.norm_eps,
        }

    image, text = config.image, config.text
    vision = {"image_size": image.image_size, "patch_size": image.patch_size, "num_channels": image.channels}
    language = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "eos_token_id": text.eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    network = CLIPModel(
        CLIPConfig(
            text_config=sizes(text.transformer) | language,
            vision_config=sizes(image.transformer) | vision,
            projection_dim=config.embedding,
        )
    )
    pixels, tokens = normalised(batch["image"]), torch.from_numpy(np.int64(batch["tokens"]))
    return torch_step(network, optimizer, lambda: network(tokens, pixels, return_loss=True).loss)


def open_clip(config: clip.Config, optimizer: Optimizer, batch: dict[str, np.ndarray]) -> Contender:
    import torch
    from open_clip import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image, text = config.image, config.text
    v, t = image.transformer, text.transformer
    if t.mlp != 4 * t.width:
        raise UserError(f"a text tower of open_clip has 4 times its width of {t.width} hidden units, not {t.mlp}")
    network = CLIP(
        config.embedding,
        CLIPVisionCfg(
            layers=v.depth,
            width=v.width,
            head_width=v.width // v.heads,
            mlp_ratio=v.mlp / v.width,
            patch_size=image.patch_size,
            image_size=image.image_size,
        ),
        CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=t.width,
            heads=t.heads,
            layers=t.depth,
        ),
        quick_gelu=v.activation == "quick_gelu",
    )
    pixels, tokens, loss = normalised(batch["image"]), torch.from_numpy(np.int64(batch["tokens"])), ClipLoss()
    return torch_step(network, optimizer, lambda: loss(*network(pixels, tokens)))


def diffuser(
    config: diffusion.Config | probability_flow.Config | vdm.Config, optimizer: Optimizer, batch: dict[str, np.ndarray]
) -> Contender:
    """The network's mean square error from a noise that stays, at times that do."""
    import torch

    network, channels = config.network, config.channels
    learned = isinstance(config, diffusion.Config) and config.variance == "learned"
    inputs = channels * (1 + 2 * len(config.fourier) if isinstance(config, vdm.Config) else 1)
    outputs = channels * (2 if learned else 1)
    sizes = {"sample_size": config.image_size, "in_channels": inputs, "out_channels": outputs}
    make: Any = unet if isinstance(network.backbone, UNet) else dit
    theirs = make(network.backbone, network.classes, sizes)
    shape = (len(batch["image"]), inputs, config.image_size, config.image_size)
    x, noise = torch.randn(shape), torch.randn(shape[0], outputs, *shape[2:])
    time, label = 999 * torch.rand(shape[0]), None
    if network.classes is not None or make is dit:
        label = torch.randint(network.classes or 1, (shape[0],))

    def loss() -> Any:
        return torch.nn.functional.mse_loss(theirs(x, time, class_labels=label).sample, noise)

    return torch_step(theirs, optimizer, loss)


def unet(config: UNet, classes: int | None, sizes: dict[str, int]) -> Any:
    """Attention at the coarsest resolution's width; `diffusers` states the width of a head for all resolutions."""
    from diffusers import UNet2DModel

    heights = [sizes["sample_size"] >> level for level in range(len(config.widths))]
    attending = {width for width, height in zip(config.widths, heights, strict=True) if height in config.attention}
    if config.heads > 1 and attending - {config.widths[-1]}:
        raise UserError(f"a U-Net of diffusers has heads of one width, not {config.heads} of every width: set heads 1")
    down = ["AttnDownBlock2D" if height in config.attention else "DownBlock2D" for height in heights]
    return UNet2DModel(
        **sizes,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=None if config.heads == 1 else config.widths[-1] // config.heads,
        norm_num_groups=config.groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=None if classes is None else classes + 1,
    )


def dit(config: DiT, classes: int | None, sizes: dict[str, int]) -> Any:
    """One embedding of time and class for all blocks, as in the paper; `diffusers` gives each a copy."""
    from diffusers import DiTTransformer2DModel

    t = config.transformer
    if t.mlp != 4 * t.width:
        raise UserError(f"a DiT of diffusers has 4 times its width of {t.width} hidden units, not {t.mlp}")
    network: Any = DiTTransformer2DModel(
        **sizes,
        num_attention_heads=t.heads,
        attention_head_dim=t.width // t.heads,
        num_layers=t.depth,
        patch_size=config.patch_size,
        num_embeds_ada_norm=classes or 1,
        norm_eps=t.norm_eps,
    )
    for block in network.transformer_blocks:
        block.norm1.emb = network.transformer_blocks[0].norm1.emb
    return network


def normalised(image: np.ndarray) -> Any:
    """Channels first, in [-1, 1]."""
    import torch

    return torch.from_numpy(image.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).contiguous()

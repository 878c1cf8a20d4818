"""Pipelines of diffusers of random, perturbed weights: what they predict and draw, and that they go there and back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.dit import pipeline_dit
from safetensors.numpy import load_file, save_file

from converted import assert_trees_equal
from diffusers_pipelines import CLASSES, MAKERS, PIPELINES, SIDE, as_the_authors_have_it
from tools.convert import convert
from vlm_jax.models import build, diffusion
from vlm_jax.nn.denoiser import Denoiser, Guidance
from vlm_jax.nn.told import Conditions
from vlm_jax.objectives.diffusion import Level, to_data
from vlm_jax.pretrained import dit as dit_layout
from vlm_jax.sampling.diffusion import Denoised, ddim
from vlm_jax.trees import part
from vlm_jax.workdir import load

# Theirs, of the conversion of a tensor, and of what they are going to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CAPTIONS = ["A red circle", "cir", "two  RED circles, and a blue one which is too long to be read whole"]
LABELS = [0, 417, 999]
TIMES = [0, 417, 999]
GUIDANCE = 3.0
X = np.float32(np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 4)))
KEY = jax.random.key(0)


class Published(NamedTuple):
    name: str
    pipe: Any
    path: Path
    run: Path


@pytest.fixture(scope="module", params=MAKERS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A pipeline of theirs, where they have saved it, and the run that it becomes."""
    torch.manual_seed(0)
    pipe, path = MAKERS[request.param](), tmp_path_factory.mktemp("published")
    pipe.save_pretrained(path / "pipe")
    told = convert(str(path / "pipe"), path / "run")
    assert f"of layout {request.param};" in told
    return Published(request.param, as_the_authors_have_it(pipe), path / "pipe", path / "run")


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def their_predictions(pipe: Any, x: np.ndarray, times: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of what the images are told, and of nothing."""
    state, t = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(times)
    if isinstance(pipe, diffusers.DiTPipeline):
        labels = torch.tensor(LABELS), torch.full((3,), CLASSES)
        found = [pipe.transformer(state, timestep=t, class_labels=label).sample for label in labels]
    elif isinstance(pipe, diffusers.PixArtAlphaPipeline):
        told, mask, untold, untold_mask = pipe.encode_prompt(CAPTIONS, device="cpu")
        options = {"timestep": t, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        found = [
            pipe.transformer(state, encoder_hidden_states=text, encoder_attention_mask=inside, **options).sample
            for text, inside in ((told, mask), (untold, untold_mask))
        ]
    else:
        texts = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
        found = [pipe.unet(state, t, encoder_hidden_states=features).sample for features in texts]
    told, untold = map(channels_last, found)
    return told, untold


def given(loaded: Any) -> dict[str, np.ndarray]:
    """What the images are told."""
    if loaded.tokenizer is None:
        return {"label": np.int32(LABELS)}
    return {"tokens": loaded.tokenizer.encode(CAPTIONS, loaded.model.conditions["tokens"].shape[0])}


def our_predictions(loaded: Any, variables: Any = None) -> Callable[..., np.ndarray]:
    """`(x, times, guidance) -> output` of the whole prior."""
    prior: diffusion.Config = loaded.experiment.model.prior
    learned = prior.variance == "learned"
    module: Any = Denoiser(prior.network, prior.channels * (2 if learned else 1))
    reader = None if prior.text is None else build(prior.text)
    conditions, batch = Conditions(prior.network.classes, 0.0, reader), given(loaded)

    @jax.jit
    def predict(variables: Any, x: Any, times: Any, guidance: Any) -> Any:
        told = conditions.everything(variables, batch)
        guided = prior.channels if learned else None
        return module.apply(variables, x, times, told, guidance=Guidance(guidance), guided=guided)

    weights = part(loaded.variables if variables is None else variables, "prior")
    return lambda x, times, guidance: predict(weights, x, jnp.float32(times), jnp.float32(guidance))


def assert_near(found: Any, expected: np.ndarray, share: float = 1e-4) -> None:
    """Within a share of the largest value."""
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def test_texts_are_the_same_tokens(published: Published):
    if published.name == "dit":
        pytest.skip("it is told no text")
    tokens = given(load(published.run))["tokens"]
    captions = [caption.lower() for caption in CAPTIONS] if published.name == "pixart" else CAPTIONS
    options = {"padding": "max_length", "truncation": True, "max_length": tokens.shape[1]}
    np.testing.assert_array_equal(tokens, published.pipe.tokenizer(captions, **options).input_ids)


def test_the_prior_predicts_what_diffusers_does(published: Published):
    """Told and untold, and with guidance, which of a learned variance leaves the second half as it is told."""
    loaded = load(published.run)
    told, untold = their_predictions(published.pipe, X, TIMES)
    predict = our_predictions(loaded)
    assert np.abs(told - untold).max() > 0.01 * np.abs(told).max()
    eps, rest = np.split(told, [4], axis=-1)
    for guidance in (1.0, 0.0, GUIDANCE):
        guided = untold[..., :4] + guidance * (eps - untold[..., :4])
        assert_near(predict(X, TIMES, guidance), np.concatenate([guided, rest], axis=-1))


def noise_of(key: jax.Array) -> np.ndarray:
    """What `sample` begins with."""
    return np.asarray(jax.random.normal(jax.random.split(key, 3)[1], X.shape))


def drawn_by_theirs(pipe: Any, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Images on [0, 1] in five steps."""
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    options = {"num_inference_steps": 5, "guidance_scale": GUIDANCE, "output_type": "np"}
    if isinstance(pipe, diffusers.DiTPipeline):
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: latents)
        return pipe(LABELS, **options).images
    if isinstance(pipe, diffusers.PixArtAlphaPipeline):
        options["use_resolution_binning"] = False
    return pipe(CAPTIONS, latents=latents, **options).images


OTHERWISE_SAID = {"sample_size", "shift_factor", "interpolation_scale", "use_additional_conditions"}
"""Settings that may be written as what follows from others, or not at all; a first stage is of any size."""


def settings_of(network: Any) -> dict[str, Any]:
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in network.config.items()}
    return {key: value for key, value in told.items() if not key.startswith("_")}


def test_what_is_written_is_a_pipeline_that_draws_the_same(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every array comes back, no key is missing, and its scheduler goes where `ddim` goes here."""
    convert(str(published.run), tmp_path / "out", layout=published.name)
    for file in published.path.rglob("*.safetensors"):
        arrays = load_file(tmp_path / "out" / file.relative_to(published.path))
        prefix = "text_model." if file.parent.name == "text_encoder" and published.name != "pixart" else ""
        assert_trees_equal(arrays, {prefix + key: array for key, array in load_file(file).items()})
    pipe = as_the_authors_have_it(PIPELINES[published.name].from_pretrained(tmp_path / "out"))
    for name in {"unet", "transformer", "vae"} & pipe.components.keys():
        theirs, ours = settings_of(getattr(published.pipe, name)), settings_of(getattr(pipe, name))
        assert {key for key, value in ours.items() if theirs[key] != value} <= OTHERWISE_SAID, name
    assert isinstance(pipe.scheduler, DDIMScheduler)
    loaded = load(published.run)
    sampling = diffusion.Sampling(solver="ddim", steps=5, guidance=GUIDANCE)
    expected = drawn_by_theirs(pipe, noise_of(KEY), monkeypatch)
    assert expected.std() > 0.05
    found = loaded.model.sample(loaded.variables, KEY, given(loaded), num=3, sampling=sampling)
    np.testing.assert_allclose(np.asarray(found) / 255, expected, rtol=0, atol=0.6 / 255)


@pytest.mark.parametrize("published", ["stable-diffusion"], indirect=True)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_five_steps_as_the_published_scheduler_spaces_them_are_the_same(published: Published, kind: str):
    """From the second time of a step on, to the first of all: no sampling here is spaced so, but the solver is."""
    options = {"timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False, "prediction_type": kind}
    scheduler = DDIMScheduler.from_config(published.pipe.scheduler.config, **options)
    assert scheduler.config.steps_offset == 1
    scheduler.set_timesteps(5)
    state = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
    for t in scheduler.timesteps:
        told, untold = their_predictions(published.pipe, channels_last(state), [int(t)] * 3)
        output = torch.from_numpy((untold + GUIDANCE * (told - untold)).transpose(0, 3, 1, 2))
        state = scheduler.step(output, t, state).prev_sample
    predict = our_predictions(load(published.run))
    signal = np.concatenate([[1.0], scheduler.alphas_cumprod.numpy()])
    alphas, sigmas = jnp.float32(np.sqrt(signal)), jnp.float32(np.sqrt(1 - signal))
    times = jnp.array([*(int(t) + 1 for t in scheduler.timesteps), 1])

    def denoise(x: Any, t: Any) -> Denoised:
        output = predict(x, jnp.broadcast_to(t - 1.0, 3), GUIDANCE)
        return Denoised(to_data(output, x, Level(alphas[t], sigmas[t]), "eps" if kind == "epsilon" else "v"))

    found = ddim(denoise, lambda t: (alphas[t], sigmas[t]), times, jnp.asarray(X), KEY)
    assert_near(found, channels_last(state), 1e-3)


@pytest.mark.parametrize("published", ["pixart"], indirect=True)
def test_a_null_caption_that_a_file_holds_is_what_tells_nothing(published: Published, tmp_path: Path):
    """As diffusers' own transformer computes it, all of whose places are attended to; and it goes back."""
    (tmp_path / "pipe").mkdir()
    for file in (each for each in published.path.rglob("*") if each.is_file()):
        path = tmp_path / "pipe" / file.relative_to(published.path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.read_bytes())
    weights = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    null = np.float32(np.random.default_rng(1).normal(size=(120, 20)))
    save_file({**load_file(weights), "caption_projection.y_embedding": null}, weights)
    convert(str(tmp_path / "pipe"), tmp_path / "run")
    loaded = load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.variables["params"]["prior"]["untold"]["features"], null)
    state, none = torch.from_numpy(X.transpose(0, 3, 1, 2).copy()), {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        features = torch.from_numpy(null)[None].repeat(3, 1, 1)
        told = {"encoder_hidden_states": features, "timestep": torch.tensor(TIMES), "added_cond_kwargs": none}
        expected = channels_last(published.pipe.transformer(state, **told).sample)
    assert_near(our_predictions(loaded)(X, TIMES, 0.0)[..., :4], expected[..., :4])
    convert(str(tmp_path / "run"), tmp_path / "out", layout="pixart")
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_trees_equal(written, load_file(weights))
    diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")


AUTHORS = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)
"""diffusers' keys of a DiT -> the authors', as diffusers' script of conversion has them."""


@pytest.mark.parametrize("published", ["dit"], indirect=True)
def test_the_authors_names_of_a_dit_hold_the_same(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The transformer alone, as a model of latents."""
    state = {key: tensor.numpy() for key, tensor in published.pipe.transformer.state_dict().items()}
    arrays = {"pos_embed": published.pipe.transformer.pos_embed.pos_embed.numpy()}
    for key, array in state.items():
        found = [re.sub(pattern, other, key) for pattern, other in AUTHORS if re.search(pattern, key)]
        arrays |= dict.fromkeys(found, array)
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] for name in "qkv"]
            arrays[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    save_file(arrays, tmp_path / "model.safetensors")
    monkeypatch.setitem(dit_layout.HEADS, 32, 4)
    convert(str(tmp_path / "model.safetensors"), tmp_path / "run", layout="dit-original")
    whole, alone = load(published.run), load(tmp_path / "run")
    assert alone.experiment.model == whole.experiment.model.prior
    assert_trees_equal(alone.variables["params"], whole.variables["params"]["prior"])
    convert(str(tmp_path / "run"), tmp_path / "out", layout="dit-original")
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(written.pop("pos_embed"), arrays.pop("pos_embed"), atol=1e-5)
    assert_trees_equal(written, arrays)

"""Chameleon: what transformers computes of the same weights, of both placements of norms, and written back for it.

Weights are random and moved: norms, biases and scales are none of the ones that an initialisation gives. So is the
decoder of images, which transformers has not; tests/parity/test_autoencoders.py compares such ones with diffusers'.
"""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image as PillowImage
from safetensors.numpy import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonProcessor, PreTrainedTokenizerFast
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from converted import TOKENIZER
from experiments.chameleon import chameleon_7b, chameleon_34b
from reference import random_params
from tools.convert import convert
from vlm_jax import models
from vlm_jax.contract import Input
from vlm_jax.data.conversation import Message, conversation
from vlm_jax.data.picture import Picture
from vlm_jax.models import chameleon, vqvae
from vlm_jax.models.language import Language
from vlm_jax.nn import decoder
from vlm_jax.nn.decoder import DecoderConfig, PostNormDecoderConfig
from vlm_jax.nn.sequence import attention_mask, positions
from vlm_jax.nn.vocabulary import token_logits
from vlm_jax.pretrained import compvis
from vlm_jax.pretrained.chameleon import LAYOUT, names_of
from vlm_jax.pretrained.layout import abstract_params, named, nested, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.trees import leaves_by_path, part
from vlm_jax.workdir import load

SPECIAL = ("<racm3:break>", "<eoss>", "<image>", "<reserved08706>")
WORDS, CODES = TOKENIZER.vocab_size, 24
BEGIN, END, PLACEHOLDER, SEPARATOR = range(WORDS, WORDS + len(SPECIAL))
CODE, VOCAB = WORDS + len(SPECIAL), WORDS + len(SPECIAL) + CODES + 2
SIDE, SPAN = 4, 18
NAMES = {
    "<s>": TOKENIZER.bos_id,
    **dict(zip(SPECIAL, (BEGIN, END, PLACEHOLDER, SEPARATOR), strict=True)),
    **{f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z": CODE + code for code in range(CODES)},
}
FIRST = {
    "embed_dim": 8,
    "num_embeddings": CODES,
    "latent_channels": 12,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [8],
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": TOKENIZER.bos_id,
    "eos_token_id": TOKENIZER.eos_id,
    "vq_config": FIRST,
    "vocabulary_map": NAMES,
}
RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (2, 1, 16, 16, 3)).astype(np.uint8)
IMAGE_AT = np.array([[2], [7]], np.int32)
TOKENS = RANDOM.integers(3, WORDS, (2, 32)).astype(np.int32)
LATENTS = slice(CODE, CODE + CODES)


def reader() -> Any:
    """A tokenizer that knows the names of the special tokens."""
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.tokenizer.to_str())
    inner.add_special_tokens([*SPECIAL])
    return replace(TOKENIZER, tokenizer=inner)


def perturbed(*, swin: bool) -> Any:
    """A model of transformers with random weights, of which none is what an initialisation makes it."""
    torch.manual_seed(0)
    config = ChameleonConfig(**SIZES, swin_norm=swin)
    model = ChameleonForConditionalGeneration._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.3 if parameter.ndim == 1 or "_norm" in key else 0.1) * torch.randn_like(parameter))
            if key.endswith("embed_tokens.weight"):
                parameter.mul_(0.02)  # faint, so that the epsilon of the first norm is a part that one sees
            if key.endswith("quantize.embedding.weight"):
                parameter.copy_(torch.randn_like(parameter))
            if key.endswith("vqmodel.quant_conv.weight"):
                parameter.mul_(5)  # so that features differ by more than their mean
    return model


def tokenizer_of_images(model: Any) -> dict[str, np.ndarray]:
    """All of it by CompVis's key names: theirs, and a random decoder."""
    first = vqvae.Config(
        image_size=16,
        network=vqvae.Pyramid(widths=(32, 32, 64), attention=(8,)),
        hidden=12,
        quantizer=vqvae.Learned(size=CODES, width=8),
        objective=None,
    )
    layout = named(compvis.LAYOUTS, "vqgan")
    params = random_params(abstract_params(first), 0.1)
    arrays = dict(written(layout, first, params, written_keys(layout, first, params)))
    theirs = {key: value.numpy() for key, value in model.model.vqmodel.state_dict().items()}
    assert {key for key in arrays if not key.startswith("decoder.")} == theirs.keys()
    return arrays | theirs


@pytest.fixture(scope="module", params=[False, True], ids=["norms before", "norms of branches"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Any, Path]:
    """A model of theirs, and the directory where they have saved it, with what the release has beside it."""
    model, path = perturbed(swin=request.param), tmp_path_factory.mktemp("published") / "weights"
    model.save_pretrained(path)
    reader().save(path / "tokenizer.json")
    ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    (path / "vqgan").mkdir()
    save_file(tokenizer_of_images(model), path / "vqgan" / "vqgan.safetensors")
    return request.param, model, path


def theirs_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the images, and logits of all tokens, after each place of rows with the images in them."""
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    for row, (at,) in enumerate(IMAGE_AT):
        tokens[row, at], tokens[row, at + 1 : at + SPAN - 1], tokens[row, at + SPAN - 1] = BEGIN, PLACEHOLDER, END
    pixels = torch.from_numpy(np.float32(PICTURES[:, 0] / 127.5 - 1)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model.lm_head(model.model(input_ids=tokens, pixel_values=pixels).last_hidden_state)
        masked = model(input_ids=tokens, pixel_values=pixels).logits.numpy()
        codes = model.get_image_tokens(pixels).numpy()
    logits = logits.numpy()
    words = np.delete(np.arange(VOCAB), np.r_[LATENTS])
    np.testing.assert_array_equal(masked[..., words], logits[..., words])
    assert (masked[..., LATENTS] == np.finfo(np.float32).min).all()
    return codes, logits


def rows(codes: np.ndarray) -> np.ndarray:
    """The tokens that they stand for."""
    tokens = TOKENS.copy()
    for row, (at,) in enumerate(IMAGE_AT):
        tokens[row, at : at + SPAN] = [BEGIN, *codes[row], END]
    return tokens


def ours_of(config: chameleon.Config, variables: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of the token after each place."""

    def logits(module: Language, tokens: jax.Array) -> jax.Array:
        segment = jnp.ones_like(tokens)
        x, _ = module.decoder(module.embed(tokens), positions(segment), attention_mask(segment))
        return token_logits(x, module.outputs())

    apply = partial(Language(config.language).apply, part(variables, "language"), method=logits)
    return np.asarray(jax.jit(apply)(tokens))


def test_codes_and_logits_are_those_of_transformers(published: tuple[bool, Any, Path], tmp_path: Path):
    """Of all tokens before transformers forbids codes, and by way of the family's own rows."""
    swin, model, path = published
    codes, expected = theirs_of(model)
    assert expected.std() > 0.5 and len(np.unique(codes)) > 8
    convert(str(path), tmp_path / "run")
    loaded = load(tmp_path / "run")
    config = loaded.experiment.model
    assert type(config.language.decoder) is (PostNormDecoderConfig if swin else DecoderConfig)
    encode = jax.jit(models.build(config.first).encode)
    found = encode(part(loaded.variables, "first"), PICTURES[:, 0])
    np.testing.assert_array_equal(CODE + np.asarray(found).reshape(2, -1), codes)
    logits = ours_of(config, loaded.variables, rows(codes))
    np.testing.assert_allclose(logits / expected.std(), expected / expected.std(), atol=1e-5)

    batch = {"tokens": TOKENS, "target": np.ones_like(TOKENS, bool), "segment": np.ones_like(TOKENS)}
    batch |= {"image": PICTURES, "image_at": IMAGE_AT}
    loss = jax.jit(partial(loaded.model.loss, train=False))
    _, told = loss(loaded.variables, batch, jax.random.key(0), jnp.int32(0))
    log_probs = jax.nn.log_softmax(np.float64(expected[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_probs), rows(codes)[:, 1:, None], axis=-1).mean()
    assert float(told.metrics["cross_entropy"]) == pytest.approx(nats, rel=1e-5)


def test_what_is_written_is_read_by_transformers(published: tuple[bool, Any, Path], tmp_path: Path):
    _, model, path = published
    codes, expected = theirs_of(model)
    convert(str(path), tmp_path / "run")
    convert(str(tmp_path / "run"), tmp_path / "back", layout="chameleon")
    back, told = ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=0)
    again = theirs_of(back.eval())
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], expected)
    old, new = (
        load_file(file) for file in (path / "vqgan/vqgan.safetensors", tmp_path / "back/vqgan/model.safetensors")
    )
    assert old.keys() == new.keys() and all(np.array_equal(old[key], new[key]) for key in old)
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert load(tmp_path / "again").experiment == load(tmp_path / "run").experiment


FAULTS = ("placement of norms", "one norm for all heads", "eps", "neighbours rotated")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(
    published: tuple[bool, Any, Path], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the comparison above allows is less than each of these does."""
    swin, model, path = published
    convert(str(path), tmp_path / "run")
    loaded = load(tmp_path / "run")
    config, variables = loaded.experiment.model, loaded.variables
    d = config.language.decoder
    if fault == "placement of norms":
        d = (DecoderConfig if swin else PostNormDecoderConfig)(**vars(d))
    if fault == "eps":
        d = replace(d, norm_eps=1e-6)
    if fault == "one norm for all heads":
        leaves = leaves_by_path(variables)
        for key, leaf in leaves.items():
            if "query_norm" in key:
                leaves[key] = jnp.broadcast_to(leaf[..., :1, :], leaf.shape)
        variables = nested(leaves)
    if fault == "neighbours rotated":

        def turned(x: jax.Array, by: Any) -> jax.Array:
            first, second = x[..., ::2], x[..., 1::2]
            pairs = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
            return jnp.stack(pairs, axis=-1).reshape(x.shape)

        monkeypatch.setattr(decoder, "rotate", turned)
    codes, expected = theirs_of(model)
    wrong = replace(config, language=replace(config.language, decoder=d))
    assert np.abs(ours_of(wrong, variables, rows(codes)) - expected).max() / expected.std() > 2e-5


@pytest.mark.parametrize("shape", [(41, 30), (16, 57), (16, 16), (9, 50)])
def test_images_are_made_as_its_processor_makes_them(published: tuple[bool, Any, Path], shape: tuple[int, int]):
    """Within a level of 256 and what lies between 0.0078 and 2/255, of which the second is the release's own."""
    _, _, path = published
    array = 80 + RANDOM.integers(0, 96, (*shape, 3)).astype(np.uint8)
    picture, encoded = PillowImage.fromarray(array), io.BytesIO()
    picture.save(encoded, "png")
    image = LAYOUT.fields(open_source(path))[0].image
    record = {"image": Picture(encoded.getvalue(), "record 0")}
    found = image.read(record, {"image": Input((16, 16, 3), "uint8", 256)}, None, None)["image"]
    expected = ChameleonImageProcessorPil.from_pretrained(path)(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found * 0.0078 - 1, expected.transpose(1, 2, 0), atol=1.01 / 127.5)


def test_a_question_is_put_as_its_processor_puts_it(published: tuple[bool, Any, Path], tmp_path: Path):
    _, _, path = published
    convert(str(path), tmp_path / "run")
    convert(str(tmp_path / "run"), tmp_path / "back", layout="chameleon")
    images = ChameleonImageProcessorPil.from_pretrained(tmp_path / "back")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    processor = ChameleonProcessor(images, tokenizer, image_seq_length=settings["image_seq_length"])
    question = "the red circle<image>"
    theirs = processor(text=question, images=PillowImage.fromarray(PICTURES[0, 0]), add_special_tokens=False)
    own = load(tmp_path / "run").tokenizer
    ours = conversation([Message("user", question)], own.chat_template, own, images=1, span=SPAN)
    ids = ours.tokens.copy()
    (at,) = ours.image_at
    ids[at : at + SPAN] = [BEGIN, *[PLACEHOLDER] * SIDE**2, END]
    assert [TOKENIZER.bos_id, *np.ravel(theirs["input_ids"])] == ids.tolist()
    pixels = np.asarray(theirs["pixel_values"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, PICTURES[0, 0] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "arrays", "settings"),
    [
        (chameleon_7b, 548, {}),
        (
            chameleon_34b,
            548 + 16 * 13,
            {
                "hidden_size": 8192,
                "intermediate_size": 22_016,
                "num_hidden_layers": 48,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "swin_norm": True,
            },
        ),
    ],
)
def test_presets_have_the_arrays_of_the_release(preset: Any, arrays: int, settings: dict[str, Any]):
    """None is made here, on either side."""
    config = preset().model
    with torch.device("meta"):
        told = ChameleonConfig(**settings, vocabulary_map=names_of(config, None))
        state = ChameleonForConditionalGeneration(told).state_dict()
    assert len(state) == arrays
    sizes = written_keys(LAYOUT, config, abstract_params(config))
    theirs = {key: size for key, size in sizes.items() if not key.startswith("vqgan/")}
    assert theirs == {key: 4 * value.numel() for key, value in state.items()}
    painter = {key for key in sizes if key.startswith("vqgan/decoder.")}
    assert sizes.keys() - theirs.keys() - painter == {
        key.replace("model.vqmodel.", "vqgan/") for key in state if key.startswith("model.vqmodel.")
    }

"""Chameleon's layout: there and back with the decoder of images beside it, and what cannot be expressed is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from converted import TOKENIZER, assert_trees_equal
from experiments.chameleon import chameleon_7b, chameleon_34b
from reference import random_params
from smallest import AUTOENCODER
from tools.convert import convert
from vlm_jax.data import Data, Text
from vlm_jax.data.conversation import ALONE
from vlm_jax.data.fields import Image
from vlm_jax.data.interleaved import Interleaved
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import chameleon, language, vqvae
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.decoder import DecoderConfig, PostNormDecoderConfig
from vlm_jax.nn.quantize import EMA
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.chameleon import LAYOUT, export, names_of
from vlm_jax.pretrained.convert import files_of
from vlm_jax.pretrained.layout import abstract_params, read_params, recognised, written, written_keys
from vlm_jax.pretrained.source import Source, open_source
from vlm_jax.pretrained.tensors import Stored, Tensors
from vlm_jax.start import Start, check_configs
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.workdir import load

WORDS, CODES = TOKENIZER.vocab_size, 12
DECODER = DecoderConfig(width=12, depth=2, heads=2, kv_heads=1, head_width=6, mlp=10, qk_norm="layer")
CONFIG = chameleon.Config(
    first=replace(
        vqvae.CHAMELEON_F16,
        image_size=32,
        network=Pyramid(widths=(32, 32, 64, 64), blocks=1, attention=(8,)),
        hidden=6,
        quantizer=replace(vqvae.CHAMELEON_F16.quantizer, size=CODES, width=4),
    ),
    language=language.Config(vocab_size=WORDS + 2 + CODES, context_length=64, eos_id=TOKENIZER.eos_id, decoder=DECODER),
    bos_id=TOKENIZER.bos_id,
    begin_id=WORDS,
    end_id=WORDS + 1,
    code_at=WORDS + 2,
)
BRANCHES = replace(CONFIG, language=replace(CONFIG.language, decoder=PostNormDecoderConfig(**vars(DECODER))))
PARAMS = random_params(abstract_params(CONFIG), 0.2)
EXPERIMENT = Experiment(
    model=CONFIG,
    data=Data(name=None, fields=(Interleaved(image=Image(method="lanczos")),), text=Text(vocab_size=WORDS)),
    training=Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1),
)
TABLE = "model.vqmodel.quantize.embedding.weight"


def write(directory: Path, config: chameleon.Config = CONFIG, change: Callable[[Any], Any] = lambda told: told) -> Path:
    """Weights, and a config.json, changed."""
    arrays = dict(written(LAYOUT, config, PARAMS, written_keys(LAYOUT, config, PARAMS)))
    for file in files_of(LAYOUT.weights, {key: array.nbytes for key, array in arrays.items()})[0]:
        (directory / file.directory).mkdir(parents=True, exist_ok=True)
        held = {key.removeprefix(file.directory): arrays[key] for key in file.keys}
        save_file(held, directory / file.directory / file.name)
    for name, told in export(replace(EXPERIMENT, model=config), TOKENIZER).items():
        content = change(json.loads(json.dumps(told))) if name == "config.json" else told
        (directory / name).write_text(json.dumps(content))
    TOKENIZER.save(directory / "tokenizer.json")
    return directory


def merged(**settings: Any) -> Callable[[Any], Any]:
    """What changes a config.json, and in a dictionary of it the settings of that alone."""

    def change(told: Any) -> Any:
        return {**told, **{k: {**told[k], **v} if isinstance(told.get(k), dict) else v for k, v in settings.items()}}

    return change


def without(key: str, name: str) -> Callable[[Any], Any]:
    return lambda told: {**told, key: {each: value for each, value in told[key].items() if each != name}}


def read(path: Path) -> tuple[chameleon.Config, Any]:
    source = open_source(path)
    layout = recognised(source, LAYOUTS)
    assert layout is LAYOUT
    config = layout.config(source)
    return config, read_params(layout, config, source.tensors)


@pytest.mark.parametrize("config", [CONFIG, BRANCHES], ids=["norms before", "norms of branches"])
def test_settings_and_arrays_go_there_and_back(config: chameleon.Config, tmp_path: Path):
    found, params = read(write(tmp_path, config))
    assert found == config
    assert_trees_equal(params, PARAMS)


def test_the_first_stage_is_that_of_the_directory_within(tmp_path: Path):
    source = open_source(write(tmp_path) / "vqgan")
    layout = recognised(source, LAYOUTS)
    assert layout.name == "vqgan"
    config = layout.config(source)
    assert (config.network, config.image_size, config.hidden) == (CONFIG.first.network, 32, CONFIG.first.hidden)
    assert_trees_equal(read_params(layout, config, source.tensors), PARAMS["first"])


def test_a_run_of_it_draws_nothing_anew_and_goes_back(tmp_path: Path):
    source, run = write(tmp_path / "source"), tmp_path / "run"
    count = sum(np.size(leaf) for leaf in load_file(source / "model.safetensors").values())
    painter = load_file(source / "vqgan" / "model.safetensors").items()
    count += sum(leaf.size for key, leaf in painter if key.startswith("decoder."))
    assert convert(str(source), run) == f"{run} holds {count:,} parameters in float32, of layout chameleon"
    loaded = load(run)
    assert loaded.experiment.sampling == chameleon.Sampling(top_p=0.9, guidance=3.0, image_guidance=1.2)
    convert(str(run), tmp_path / "back", layout="chameleon")
    for file in ("model.safetensors", "vqgan/model.safetensors"):
        assert_trees_equal(load_file(tmp_path / "back" / file), load_file(source / file))
    assert read(tmp_path / "back")[0] == CONFIG


def released(swin: bool) -> Source:
    """The settings of the release, without an array: those of 7B are what transformers has where nothing is told."""
    model = (chameleon_34b if swin else chameleon_7b)().model
    large = {"hidden_size": 8192, "intermediate_size": 22_016, "num_hidden_layers": 48, "num_attention_heads": 64}
    told = {"model_type": "chameleon", "vocabulary_map": names_of(model, None)}
    told |= {**large, "num_key_value_heads": 8, "swin_norm": True} if swin else {}

    def never() -> np.ndarray:
        raise AssertionError

    keys = ("model.embed_tokens.weight", "vqgan/encoder.conv_in.weight", "vqgan/decoder.conv_in.weight")
    tensors = Tensors(Path("nowhere"), {key: Stored((1,), np.dtype(np.float32), never) for key in keys})
    return Source(Path("nowhere"), tensors, told)


@pytest.mark.parametrize("swin", [False, True], ids=["7B", "34B"])
def test_a_run_of_the_preset_starts_from_the_release(swin: bool):
    config = LAYOUT.config(released(swin))
    check_configs(Start(workdir="runs/chameleon"), config, (chameleon_34b if swin else chameleon_7b)().model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (merged(swin_norm="both"), "swin_norm in .* is 'both': it must be true"),
        (merged(rms_norm_eps=1e-6), "rms_norm_eps in .* is 1e-06, which the model cannot express: 1e-05 is"),
        (merged(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "the rotary positions in .* are .*yarn"),
        (merged(hidden_act="gelu"), "hidden_act in .* is 'gelu'"),
        (merged(vq_config={"double_latent": True}), "double_latent in the vq_config of .* is True"),
        (merged(vq_config={"attn_type": "linear"}), "attn_type in the vq_config of .* is 'linear'"),
        (
            merged(vq_config={"channel_multiplier": [2, 4, 4, 4]}),
            r"channel_multiplier is \[2, 4, 4, 4\], which must begin with 1",
        ),
        (
            merged(vq_config={"resolution": "32"}),
            "the vq_config of .* does not hold the settings of an image tokenizer",
        ),
        (lambda told: {**told, "vocabulary_map": None}, "holds no vocabulary_map"),
        (without("vocabulary_map", "<eoss>"), "the vocabulary_map of .* lacks <eoss>"),
        (without("vocabulary_map", "IMGIMGHZ"), "names 11 codes of images, and the tokenizer of images has 12"),
        (
            merged(vocabulary_map={"IMGIMGBAZ": WORDS + 13, "IMGIMGBBZ": WORDS + 12}),
            rf"gives the code 10 the token {WORDS + 13}, and {WORDS + 12} is due .* in another order",
        ),
        (merged(vocabulary_map={"<s>": 5}), "begins a text with the id 1 and the vocabulary_map of .* with 5"),
    ],
)
def test_a_setting_that_cannot_be_expressed_is_refused_by_its_name(
    change: Callable[[Any], Any], words: str, tmp_path: Path
):
    with pytest.raises(UserError, match=words):
        convert(str(write(tmp_path / "source", change=change)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_decoder_of_images_it_is_said_where_that_is(tmp_path: Path):
    """Not there, as the release has it, and left out."""
    source = write(tmp_path)
    vqgan = source / "vqgan" / "model.safetensors"
    arrays = load_file(vqgan)
    vqgan.unlink()
    (source / "vqgan" / "config.json").unlink()
    (source / "vqgan").rmdir()
    due = (
        r"vqgan holds no decoder of images, .* copy tokenizer/vqgan\.ckpt .* run there python -c .*'vqgan\.safetensors'"
    )
    with pytest.raises(UserError, match=due):
        read(source)
    (source / "vqgan").mkdir()
    (source / "vqgan" / "vqgan.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"vqgan\.ckpt is a pickle, .* run python -c .*torch\.load"):
        read(source)
    save_file({key: array for key, array in arrays.items() if not key.startswith("decoder.")}, vqgan)
    with pytest.raises(UserError, match="vqgan holds no decoder of images"):
        read(source)
    kept = {key: array for key, array in arrays.items() if key != "decoder.mid.attn_1.q.weight"}
    save_file(kept, vqgan)
    with pytest.raises(UserError, match=r"lacks vqgan/decoder\.mid\.attn_1\.q\.weight"):
        read(source)
    save_file({**arrays, "loss.discriminator.main.0.weight": np.zeros(3, np.float32)}, vqgan)
    assert_trees_equal(read(source)[1], PARAMS)


def test_both_tokenizers_of_images_must_be_the_same_to_the_coarser_rounding(tmp_path: Path):
    """The release's is in float32, whatever the language model is in; what is kept is the finer one."""
    source = write(tmp_path)
    weights = load_file(source / "model.safetensors")
    save_file({key: array.astype(jnp.bfloat16) for key, array in weights.items()}, source / "model.safetensors")
    config, params = read(source)
    assert (config.language.decoder.dtype, config.first.network.dtype) == ("bfloat16", "float32")
    assert_trees_equal(params["first"], PARAMS["first"])
    table = params["language"]["token"]["embedding"]
    np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"].astype(jnp.bfloat16).astype(np.float32))
    save_file({**weights, TABLE: weights[TABLE] + 0.01}, source / "model.safetensors")
    with pytest.raises(UserError, match=rf"{TABLE} in .* is another table than it repeats"):
        read(source)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"rescale_factor": 1 / 255}, "make -1 of black and 0 of white"),
        ({"image_std": [0.5] * 3}, "make -2 of black"),
        ({"resample": 5}, "resample in .* is 5"),
        ({"do_center_crop": False}, "size in .* is"),
    ],
)
def test_a_processor_that_makes_other_images_is_refused(told: dict[str, Any], words: str, tmp_path: Path):
    path = write(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    with pytest.raises(UserError, match=words):
        LAYOUT.fields(open_source(tmp_path))


def test_images_are_scaled_as_the_release_does_and_questions_put_by_its_mark(tmp_path: Path):
    source = open_source(write(tmp_path))
    documents, question, caption = LAYOUT.fields(source)
    assert {each.image for each in (documents, question, caption)} == {Image(method="lanczos")}
    assert question.template == caption.template == ALONE
    (tmp_path / "preprocessor_config.json").unlink()
    assert LAYOUT.fields(source)[0].image == Image(method="lanczos")
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.tokenizer.to_str())
    inner.add_special_tokens(["<reserved08706>"])
    replace(TOKENIZER, tokenizer=inner).save(tmp_path / "tokenizer.json")
    template = LAYOUT.tokenizer(source).chat_template
    assert "<reserved08706>" in template and LAYOUT.fields(source)[1].template is None


def of_first(**changes: Any) -> chameleon.Config:
    return replace(CONFIG, first=replace(CONFIG.first, **changes))


def of_decoder(**changes: Any) -> chameleon.Config:
    return replace(CONFIG, language=replace(CONFIG.language, decoder=replace(DECODER, **changes)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(CONFIG, first=AUTOENCODER), "first is 'vlm_jax.models.autoencoder' and Chameleon's layouts have"),
        (of_first(quantizer=EMA(size=CODES, width=4)), "first.quantizer is 'EMA'"),
        (of_first(quantizer=replace(CONFIG.first.quantizer, unit=True)), "first.quantizer.unit is True"),
        (of_first(levels=17), "first.levels is 17"),
        (of_first(network=Pyramid(widths=(16, 64, 64, 64), groups=16)), "first.network.groups is 16"),
        (of_first(network=Pyramid(widths=(64, 96, 96, 96))), r"first.network.widths is \(64, 96, 96, 96\)"),
        (of_decoder(qk_norm="rms"), "language.decoder.qk_norm is 'rms'"),
        (of_decoder(qkv_bias=True), "language.decoder.qkv_bias is True"),
        (of_decoder(norm_eps=1e-6), "language.decoder.norm_eps is 1e-06"),
        (of_decoder(head_width=8), "language.decoder.head_width is 8"),
    ],
)
def test_a_model_that_the_layout_does_not_hold_is_refused_by_its_setting(config: chameleon.Config, words: str):
    with pytest.raises(UserError, match=words):
        export(replace(EXPERIMENT, model=config), TOKENIZER)

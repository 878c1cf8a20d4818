"""The layouts of CLIP and SigLIP: there and back, each beside the others of the same weights, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_jax.data import Caption, Data, Image, train_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.images import OPENAI_MEAN, OPENAI_STD
from vlm_jax.pretrained.layout import abstract_params, named, read_params, recognised, written, written_keys
from vlm_jax.pretrained.siglip import canonical
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import leaves_by_path

STACK = Transformer(width=64, depth=2, heads=1, mlp=24, activation="quick_gelu", norm_eps=1e-5)
CLIP = clip.Config(
    image=VisionTransformer(
        image_size=8,
        patch_size=4,
        pre_norm=True,
        patch_bias=False,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        transformer=replace(STACK, width=128, heads=2, mlp=20, depth=3),
    ),
    text=clip.TextTransformer(vocab_size=300, context_length=6, eos_id=299, transformer=STACK),
    embedding=5,
)
PLAIN = Transformer(width=12, depth=2, heads=3, mlp=20)
SIGLIP = clip.Config(
    objective="sigmoid",
    image=VisionTransformer(image_size=8, patch_size=4, pool="attention", transformer=replace(PLAIN, depth=3)),
    text=clip.TextTransformer(vocab_size=300, context_length=6, eos_id=1, pool="last", transformer=PLAIN),
    embedding=12,
    projection=False,
)
CONFIGS = {
    "clip": CLIP,
    "open-clip": CLIP,
    "openai-clip": CLIP,
    "siglip": SIGLIP,
    "big-vision": SIGLIP,
    "big-vision-scan": SIGLIP,
}
IMAGES = {
    "siglip": Image(resize="squash"),
    "big-vision": Image(resize="squash", method="bilinear"),
    "big-vision-scan": Image(resize="squash", method="bilinear"),
}


def random_params(config: clip.Config) -> Any:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract_params(config))


def arrays_of(name: str, config: clip.Config, params: Any) -> dict[str, np.ndarray]:
    layout = named(LAYOUTS, name)
    return dict(written(layout, config, params, written_keys(layout, config, params)))


def exported(name: str, config: clip.Config, image: Image | None = None) -> dict[str, Any]:
    image = IMAGES.get(name, Image()) if image is None else image
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    experiment = Experiment(model=config, data=Data(name=None, fields=(image, Caption())), training=training)
    export = named(LAYOUTS, name).export
    assert export is not None
    return dict(export(experiment, None))


def published(name: str, directory: Path, config: clip.Config | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Random parameters in a directory, and the arrays that they were written as."""
    config = CONFIGS[name] if config is None else config
    params = random_params(config)
    arrays = arrays_of(name, config, params)
    if name == "openai-clip":
        arrays |= {key: np.asarray(value) for key, value in (("input_resolution", 8), ("context_length", 6))}
        arrays["vocab_size"] = np.asarray(300)
    directory.mkdir(exist_ok=True)
    for file, content in exported(name, config).items():
        (directory / file).write_text(json.dumps(content))
    write(directory / named(LAYOUTS, name).weights[""], arrays)
    return params, arrays


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file(arrays, path)


def assert_same(found: Any, expected: Any) -> None:
    found, expected = leaves_by_path(found), leaves_by_path(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_and_arrays_go_there_and_back(name: str, tmp_path: Path):
    params, _ = published(name, tmp_path)
    source = open_source(tmp_path)
    layout = recognised(source, LAYOUTS)
    assert layout.name == name
    config = layout.config(source)
    assert config == CONFIGS[name]
    assert_same(read_params(layout, config, source.tensors), params)
    assert layout.fields(source) == (IMAGES.get(name, Image()), Caption())


@pytest.mark.parametrize("name", ["clip", "siglip", "open-clip"])
def test_what_becomes_of_pixels_goes_there_and_back(name: str, tmp_path: Path):
    image = replace(CONFIGS[name].image, mean=(0.1, 0.2, 0.3), std=(0.7,))
    config = replace(CONFIGS[name], image=image)
    published(name, tmp_path, config)
    for shown in (Image(resize="squash", method="bilinear"), Image()):
        for file, content in exported(name, config, shown).items():
            (tmp_path / file).write_text(json.dumps(content))
        layout, source = named(LAYOUTS, name), open_source(tmp_path)
        assert layout.config(source) == config and layout.fields(source)[0] == shown


def test_openai_s_names_hold_what_hugging_face_s_do(tmp_path: Path):
    """As transformers' script of conversion has it: fused attention, and projections that are multiplied from the
    right."""
    params, arrays = published("openai-clip", tmp_path)
    theirs = arrays_of("clip", CLIP, params)
    expected = {
        "logit_scale": theirs["logit_scale"],
        "text_projection": theirs["text_projection.weight"].T,
        "visual.proj": theirs["visual_projection.weight"].T,
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    for tower, key, depth in (("text_model", "transformer", 2), ("vision_model", "visual.transformer", 3)):
        for i in range(depth):
            ours, layer = f"{key}.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            norms |= {f"{ours}.ln_1": f"{layer}.layer_norm1", f"{ours}.ln_2": f"{layer}.layer_norm2"}
            norms |= {f"{ours}.mlp.c_fc": f"{layer}.mlp.fc1", f"{ours}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms[f"{ours}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                expected[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(parts)
    for ours, key in norms.items():
        expected |= {f"{ours}.{kind}": theirs[f"{key}.{kind}"] for kind in ("weight", "bias")}
    numbers = {"input_resolution", "context_length", "vocab_size"}
    assert expected.keys() == arrays.keys() - numbers
    for key, array in expected.items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["big-vision", "big-vision-scan"])
def test_big_vision_s_names_hold_what_hugging_face_s_do(name: str, tmp_path: Path):
    """As transformers' script of conversion has it, which takes heads and layers for axes of their own."""
    params, arrays = published(name, tmp_path)
    theirs = arrays_of("siglip", SIGLIP, params)
    expected = {
        "params/t": theirs["logit_scale"],
        "params/b": theirs["logit_bias"],
        "params/img/embedding/kernel": theirs["vision_model.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "params/img/embedding/bias": theirs["vision_model.embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": theirs["vision_model.embeddings.position_embedding.weight"][None],
        "params/img/MAPHead_0/probe": theirs["vision_model.head.probe"],
        "params/txt/Embed_0/embedding": theirs["text_model.embeddings.token_embedding.weight"],
        "params/txt/pos_embedding": theirs["text_model.embeddings.position_embedding.weight"][None],
        "params/txt/head/kernel": theirs["text_model.head.weight"].T,
        "params/txt/head/bias": theirs["text_model.head.bias"],
    }

    def add(ours: str, key: str, *, norm: bool = False) -> None:
        expected[f"{ours}/{'scale' if norm else 'kernel'}"] = theirs[f"{key}.weight"].T
        expected[f"{ours}/bias"] = theirs[f"{key}.bias"]

    def attend(ours: str, weights: list[np.ndarray], biases: list[np.ndarray], key: str) -> None:
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            expected[f"{ours}/{part}/kernel"] = weight.T.reshape(12, 3, 4)
            expected[f"{ours}/{part}/bias"] = bias.reshape(3, 4)
        expected[f"{ours}/out/kernel"] = theirs[f"{key}.out_proj.weight"].T.reshape(3, 4, 12)
        expected[f"{ours}/out/bias"] = theirs[f"{key}.out_proj.bias"]

    add("params/img/Transformer/encoder_norm", "vision_model.post_layernorm", norm=True)
    add("params/txt/Encoder_0/encoder_norm", "text_model.final_layer_norm", norm=True)
    head, key = "params/img/MAPHead_0", "vision_model.head"
    fused = (np.split(theirs[f"{key}.attention.in_proj_{kind}"], 3) for kind in ("weight", "bias"))
    attend(f"{head}/MultiHeadDotProductAttention_0", *fused, f"{key}.attention")
    add(f"{head}/LayerNorm_0", f"{key}.layernorm", norm=True)
    for i in (0, 1):
        add(f"{head}/MlpBlock_0/Dense_{i}", f"{key}.mlp.fc{i + 1}")
    for ours, tower, depth in (("img/Transformer", "vision_model", 3), ("txt/Encoder_0", "text_model", 2)):
        for i in range(depth):
            block, layer = f"params/{ours}/encoderblock_{i}", f"{tower}.encoder.layers.{i}"
            weights, biases = (
                [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"] for kind in ("weight", "bias")
            )
            attend(f"{block}/MultiHeadDotProductAttention_0", weights, biases, f"{layer}.self_attn")
            for j in (0, 1):
                add(f"{block}/LayerNorm_{j}", f"{layer}.layer_norm{j + 1}", norm=True)
                add(f"{block}/MlpBlock_0/Dense_{j}", f"{layer}.mlp.fc{j + 1}")
    if name == "big-vision-scan":
        layers = [key for key in expected if "/encoderblock_0/" in key]
        for key in layers:
            depth = 3 if "/img/" in key else 2
            parts = [expected.pop(key.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(depth)]
            expected[key.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    assert expected.keys() == arrays.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)


def change(path: Path, part: str, **told: Any) -> None:
    content = json.loads(path.read_text())
    (content[part] if part else content).update(told)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "file", "part", "told", "words"),
    [
        ("clip", "config.json", "text_config", {"hidden_act": "silu"}, "hidden_act in .* is 'silu'"),
        ("clip", "config.json", "vision_config", {"attention_dropout": 0.1}, "attention_dropout in .* is 0.1"),
        ("clip", "config.json", "vision_config", {"image_size": "8"}, "size in .*preprocessor_config.json"),
        ("clip", "config.json", "text_config", {"eos_token_id": [1, 2]}, r"eos_token_id in .* is \[1, 2\]"),
        ("clip", "config.json", "", {"model_type": "clip_vision_model"}, "model_type in .* is 'clip_vision_model'"),
        (
            "clip",
            "preprocessor_config.json",
            "",
            {"resample": 5},
            r"resample in .* is 5: 1 \(lanczos\), 2 \(bilinear\)",
        ),
        ("clip", "preprocessor_config.json", "", {"do_normalize": False}, "do_normalize in .* is False"),
        ("clip", "preprocessor_config.json", "", {"rescale_factor": 0.5}, "rescale_factor in .* is 0.5"),
        ("clip", "preprocessor_config.json", "", {"size": {"shortest_edge": 9}}, "size in .* is .*9.*reads 8 pixels"),
        ("siglip", "config.json", "", {"model_type": "siglip2"}, "siglip2, that of NaFlex"),
        ("siglip", "config.json", "vision_config", {"vision_use_head": False}, "vision_use_head in .* is False"),
        ("siglip", "config.json", "text_config", {"projection_size": 7}, "projection_size in .* is 7"),
        ("open-clip", "open_clip_config.json", "model_cfg", {"custom_text": True}, "custom_text in .* is True"),
        ("open-clip", "open_clip_config.json", "model_cfg", {"multimodal_cfg": {"a": 1}}, "multimodal_cfg in .* is"),
        ("open-clip", "open_clip_config.json", "preprocess_cfg", {"resize_mode": "longest"}, "resize_mode in .* is"),
        ("open-clip", "open_clip_config.json", "preprocess_cfg", {"interpolation": "random"}, "resample in .* random"),
    ],
)
def test_a_setting_that_cannot_be_expressed_is_refused_by_its_name(
    name: str, file: str, part: str, told: dict[str, Any], words: str, tmp_path: Path
):
    published(name, tmp_path)
    change(tmp_path / file, part, **told)
    with pytest.raises(UserError, match=words):
        named(LAYOUTS, name).config(open_source(tmp_path))


@pytest.mark.parametrize("setting", [{"ls_init_value": 0.1}, {"timm_model_name": "vit"}, {"no_ln_pre": True}])
def test_another_tower_of_open_clip_s_is_refused_by_what_it_has(setting: dict[str, Any], tmp_path: Path):
    published("open-clip", tmp_path)
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    content["model_cfg"]["vision_cfg"] |= setting
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{next(iter(setting))} in .* cannot express"):
        named(LAYOUTS, "open-clip").config(open_source(tmp_path))


def test_naflex_of_big_vision_is_refused(tmp_path: Path):
    _, arrays = published("big-vision", tmp_path)
    write(tmp_path / "model.npz", {**arrays, "params/img/embedding/kernel": np.zeros((48, 12), np.float32)})
    with pytest.raises(UserError, match=r"params/img/embedding/kernel in .* is \[48, 12\], as NaFlex has it"):
        named(LAYOUTS, "big-vision").config(open_source(tmp_path))


def test_openai_s_names_without_settings_are_read_when_it_is_said_what_they_are(tmp_path: Path):
    """LAION's GELU is another, and the arrays do not tell."""
    _, arrays = published("open-clip", tmp_path / "laion")
    save_file(arrays, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    with pytest.raises(UserError, match=r"is of no layout that is known here .* openai-clip"):
        recognised(source, LAYOUTS)
    assert recognised(source, LAYOUTS, "openai-clip").config(source) == CLIP


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("clip", lambda c: replace(c, image=replace(c.image, pre_norm=False)), "image.pre_norm is False"),
        ("clip", lambda c: replace(c, text=replace(c.text, eos_id=2)), "text.eos_id is 2, which .* for the highest id"),
        ("open-clip", lambda c: replace(c, text=replace(c.text, eos_id=4)), "text.eos_id is 4"),
        ("openai-clip", lambda c: replace(c, image=replace(c.image, mean=(0.5,))), r"image.mean is \(0.5,\)"),
        ("siglip", lambda c: CLIP, "objective is 'info_nce'"),
        ("big-vision", lambda c: replace(c, image=replace(c.image, std=(0.2,))), r"image.std is \(0.2,\)"),
    ],
)
def test_what_a_layout_cannot_express_is_not_written(
    name: str, change: Callable[[clip.Config], clip.Config], words: str
):
    with pytest.raises(UserError, match=words):
        exported(name, change(CONFIGS[name]))


def test_padded_images_are_no_processor_s_of_clip():
    with pytest.raises(UserError, match=r"data\.fields pad images, which CLIPImageProcessor does not"):
        exported("clip", CLIP, Image(resize="pad"))


def test_a_filter_that_open_clip_has_not_is_refused():
    with pytest.raises(UserError, match="scale by 'lanczos': open_clip has bilinear and bicubic"):
        exported("open-clip", CLIP, Image(method="lanczos"))


def test_an_end_token_of_2_means_the_highest_id(tmp_path: Path):
    """What transformers goes by in files from before 4.31, some of which say things twice, and hold places."""
    _, arrays = published("clip", tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    change(tmp_path / "config.json", "", text_config={"hidden_size": 1}, text_config_dict={**text, "eos_token_id": 2})
    places = {"text_model.embeddings.position_ids": np.arange(6)[None]}
    save_file({**arrays, **places}, tmp_path / "model.safetensors")
    source, layout = open_source(tmp_path), named(LAYOUTS, "clip")
    assert layout.config(source) == CLIP
    read_params(layout, CLIP, source.tensors)


def test_siglip_reads_texts_in_lower_case_without_punctuation_and_always_ends_them():
    """The first SigLIP; SigLIP 2 keeps punctuation, and has a token for padding."""
    trained = train_tokenizer(["a photo of two cats"] * 9, 300)
    first, second = canonical(trained), canonical(replace(trained, tokenizer=larger(trained.tokenizer)))
    plain = trained.encode(["a photo of two cats"], 12)[0].tolist()
    words = plain[1 : plain.index(trained.eos_id)]
    for text in ("A photo, of  two CATS!", " a photo of (two) cats. "):
        ids = first.encode([text], 24)[0].tolist()
        assert ids == words + [trained.eos_id] * (24 - len(words))
    assert first.encode(["cats " * 40], 7)[0][-1] == trained.eos_id
    assert second.encode(["CATS!"], 24)[0].tolist() == [*second.encode(["cats!"], 24)[0]]
    assert second.encode(["cats!"], 24)[0].tolist() != second.encode(["cats"], 24)[0].tolist()
    assert (second.bos_id, second.pad_id) == (None, trained.pad_id)


def larger(tokenizer: Any) -> Any:
    """With so many tokens that it cannot be the first SigLIP's."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.add_tokens([f"<word {i}>" for i in range(32_001)])
    return copy

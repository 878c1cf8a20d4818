"""Chameleon in safetensors as Hugging Face has it (transformers 4 and 5), and the decoder of images that it leaves out.

`ChameleonForConditionalGeneration` encodes images and draws none: its files have of the image tokenizer all but the
decoder. That is in the release's `tokenizer/vqgan.ckpt`, by CompVis's key names, and belongs, as safetensors, into a
directory `vqgan` beside the files. The first stage is read from there, in the precision that it has there, and what
both have must be the same to the rounding of the coarser one. In float32, as it is released, it has all kept so; cast
to bfloat16 beside files in bfloat16, it lets them stay.

Codes are tokens that follow each other in the order of the codes, which the `vocabulary_map` of config.json must say.
Heads are already turned by halves, in the files and here. Where transformers forbids the tokens of codes, logits here
are the model's own: what may be drawn where is the family's business. Images are scaled to [-1, 1] as by the release's
own code; transformers multiplies them by 0.0078 for 2/255, by which white is darker by 1.4 levels of 256.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vlm_jax.data import Image, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.data.conversation import ALONE, ImageReader, VisualCaption, VisualQuestion
from vlm_jax.data.interleaved import Interleaved
from vlm_jax.data.tokenizer import SETTINGS
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import chameleon, vqvae
from vlm_jax.nn.decoder import DecoderConfig, PostNormDecoderConfig
from vlm_jax.nn.quantize import Learned
from vlm_jax.pretrained import compvis
from vlm_jax.pretrained.denoisers import below
from vlm_jax.pretrained.first_stages import FRESH
from vlm_jax.pretrained.images import pixels, resizing, square
from vlm_jax.pretrained.layout import Entry, Layout
from vlm_jax.pretrained.llama import end_of_text, language_config, language_entries, told_of
from vlm_jax.pretrained.pyramids import COMPVIS, CONV_IN, attentive, heights
from vlm_jax.pretrained.settings import expects, require
from vlm_jax.pretrained.source import CONFIG, FIRST_STAGE, Source, tokenizer_beside
from vlm_jax.pretrained.tensors import computed_in, unpickled
from vlm_jax.records import to_json

KIND = "chameleon"
USUAL = {
    "vocab_size": 65_536,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "swin_norm": False,
}
USUAL_TOKENIZER: dict[str, Any] = {
    "embed_dim": 256,
    "num_embeddings": 8192,
    "latent_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": None,
}
"""What a setting is that config.json, or its `vq_config`, leaves out (transformers' configuration classes)."""
ONLY = {"model_type": KIND, "rms_norm_eps": 1e-5}
"""The norms of queries and keys have that epsilon whatever the settings say, and here all norms have one."""
ONLY_TOKENIZER = {"double_latent": False, "attn_type": "vanilla"}
BODY, CODEC, VQGAN = "model.", "model.vqmodel.", f"{FIRST_STAGE}/"
"""What keys begin with: of the language model, of what encodes images, and of the whole first stage."""
PAINTER = f"{VQGAN}decoder.conv_in.weight"
CODE = re.compile("IMGIMG([A-J]+)Z")
"""The name of a code's token: its number, with letters for digits."""
DIGITS, LETTERS = "0123456789", "ABCDEFGHIJ"
MARKS = {"bos_id": "<s>", "begin_id": "<racm3:break>", "end_id": "<eoss>"}
"""The names of the other tokens that the family knows by their ids."""
PLACEHOLDER, SEPARATOR = "<image>", "<reserved08706>"
"""What stands for each code of an image in what transformers is given; what stands between question and answer."""
SEPARATED = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    f"{{% if message.role == 'assistant' %}}{{{{ eos_token }}}}{{% else %}}{SEPARATOR}{{% endif %}}{{% endfor %}}"
)
"""How the release is asked, which its tokenizer does not say."""
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
SCALE = 2 / 255
ROUNDED = 0.02
"""How far from -1 and 1 black and white may lie: of transformers' 0.0078 white is 0.989."""


def first_config(source: Source, where: str) -> vqvae.Config:
    """The first stage that a `vq_config` tells; raises a `UserError` that names what it cannot be."""
    told = source.config.get("vq_config") or {}
    expects(told, ONLY_TOKENIZER, f"the vq_config of {where}")
    told = {**USUAL_TOKENIZER, **told}
    try:
        base, multiples, size = told["base_channels"], tuple(told["channel_multiplier"]), told["resolution"]
        if multiples[:1] != (1,):
            raise UserError(f"channel_multiplier is {list(multiples)}, which must begin with 1")
        sides = {size // 2**level for level in range(len(multiples))}
        network = replace(
            vqvae.CHAMELEON_F16.network,
            widths=tuple(base * multiple for multiple in multiples),
            blocks=told["num_res_blocks"],
            attention=tuple(sorted(sides & set(told["attn_resolutions"] or ()))),
            dtype=computed_in(source.tensors, VQGAN + CONV_IN),
        )
        found = replace(
            vqvae.CHAMELEON_F16,
            image_size=size,
            channels=told["in_channels"],
            network=network,
            hidden=told["latent_channels"],
            quantizer=replace(
                vqvae.CHAMELEON_F16.quantizer,
                size=told["num_embeddings"],
                width=told["embed_dim"],
            ),
        )
        to_json(found)  # refuses what is not of the declared types
    except (TypeError, UserError) as error:
        raise UserError(
            f"the vq_config of {where} does not hold the settings of an image tokenizer ({error})"
        ) from error
    return found


def tokens_of(told: Mapping[str, Any], codes: int, where: str) -> dict[str, int]:
    """The tokens of images, by the fields of the family's `Config`.

    Raises:
      UserError: there is no vocabulary_map, or it lacks one, or codes do not follow each other in their order.
    """
    names = told.get("vocabulary_map")
    if not isinstance(names, dict) or not all(isinstance(token, int) for token in names.values()):
        raise UserError(f"{where} holds no vocabulary_map, which says what tokens are those of images: fetch it again")
    if missing := [name for name in MARKS.values() if name not in names]:
        raise UserError(f"the vocabulary_map of {where} lacks {missing[0]}: bring the one of the weights")
    tokens = {}
    for name, token in names.items():
        if found := CODE.fullmatch(name):
            tokens[int(found[1].translate(str.maketrans(LETTERS, DIGITS)))] = token
    if sorted(tokens) != [*range(codes)]:
        raise UserError(
            f"the vocabulary_map of {where} names {len(tokens)} codes of images, and the tokenizer of images has "
            f"{codes}: bring the one of the weights"
        )
    for code, token in sorted(tokens.items()):
        if token != tokens[0] + code:
            raise UserError(
                f"the vocabulary_map of {where} gives the code {code} the token {token}, and {tokens[0] + code} is due "
                f"after the {tokens[0]} of the first code: codes in another order cannot be expressed"
            )
    return {field: names[name] for field, name in MARKS.items()} | {"code_at": tokens[0]}


def config(source: Source) -> chameleon.Config:
    """The settings of config.json.

    Raises:
      UserError: it has one that the model cannot express, or there is no decoder of images beside the weights.
    """
    where, told = str(source.directory / CONFIG), {**USUAL, **source.config}
    expects(source.config, ONLY, where)
    if not isinstance(told["swin_norm"], bool):
        raise UserError(
            f"swin_norm in {where} is {told['swin_norm']!r}: it must be true, for norms of branches, or false"
        )
    if PAINTER not in source.tensors:
        raise UserError(
            f"{source.directory / FIRST_STAGE} holds no decoder of images, which transformers' files leave out: copy "
            f"tokenizer/vqgan.ckpt of the release into it and, where torch is, run there {unpickled('vqgan.ckpt')}"
        )
    first = first_config(source, where)
    tokens = tokens_of(told, first.quantizer.size, where)
    text = tokenizer_beside(source)
    if text is not None and text.bos_id != tokens["bos_id"]:
        raise UserError(
            f"the tokenizer in {source.directory} begins a text with the id {text.bos_id} and the vocabulary_map of "
            f"{where} with {tokens['bos_id']}: bring the tokenizer that belongs to the weights"
        )
    dtype = source.tensors.dtype(f"{BODY}embed_tokens.weight")
    language = language_config({**told, "model_type": "llama"}, end_of_text(source, told), dtype=dtype, where=where)
    kind = PostNormDecoderConfig if told["swin_norm"] else DecoderConfig
    decoder = kind(**{**vars(language.decoder), "qk_norm": "layer"})
    return chameleon.Config(first=first, language=replace(language, decoder=decoder), **tokens)


def entries(config: chameleon.Config) -> Iterator[Entry]:
    """The table; what encodes images is there twice."""
    yield from language_entries(config.language, ours="language/", body=BODY)
    yield from below("first/", VQGAN, compvis.vq_entries(config.first, COMPVIS))
    for entry in below("first/", CODEC, compvis.vq_entries(config.first, COMPVIS)):
        if not entry.path.startswith("first/decoder/"):
            yield replace(entry, copies=True)


def shown(source: Source) -> Image:
    """What its processor does to images.

    Raises:
      UserError: it makes of pixels others than numbers from -1 to 1, or does what cannot be expressed.
    """
    size, where = {**USUAL_TOKENIZER, **(source.config.get("vq_config") or {})}["resolution"], PREPROCESSOR
    usual = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square(size), "resample": 1}
    told = {**usual, "rescale_factor": SCALE, "image_mean": [1.0] * 3, "image_std": [1.0] * 3, **source.beside(where)}
    where = str(source.directory / where)
    for mean, std in zip(told["image_mean"], told["image_std"], strict=True):
        black, white = -mean / std, (255 * told["rescale_factor"] - mean) / std
        if max(abs(black + 1), abs(white - 1)) > ROUNDED:
            raise UserError(
                f"rescale_factor, image_mean and image_std in {where} make {black:.4g} of black and {white:.4g} of "
                f"white: the tokenizer of images reads -1 and 1"
            )
    halves = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return pixels({**told, **halves}, {}, size, where).image


def text_tokenizer(source: Source) -> Tokenizer | None:
    """With the release's chat template, where it has the token for that and no template of its own."""
    found = tokenizer_beside(source)
    if found is None or found.chat_template is not None or found.tokenizer.token_to_id(SEPARATOR) is None:
        return found
    return replace(found, chat_template=SEPARATED)


def fields(source: Source) -> tuple[Field, ...]:
    """Images and captions as documents, in either order; questions and what is asked for a caption by the template."""
    tokenizer, image = text_tokenizer(source), shown(source)
    template = ALONE if tokenizer is None or tokenizer.chat_template is None else None
    return (
        Interleaved(image=image),
        VisualQuestion(template=template, image=image),
        VisualCaption(template=template, image=image),
    )


def check_expressible(config: chameleon.Config) -> None:
    """Refuses what Chameleon's architecture is not, by the setting's name."""
    require({"first": (type(config.first).__module__, vqvae.__name__)}, "Chameleon")
    first, decoder = config.first, config.language.decoder
    base = first.network.widths[0]
    settings = {
        "first.levels": (first.levels, 256),
        "first.network.groups": (first.network.groups, compvis.GROUPS),
        "first.network.widths": (first.network.widths, tuple(width // base * base for width in first.network.widths)),
        "first.quantizer": (type(first.quantizer).__name__, Learned.__name__),
        "first.quantizer.unit": (getattr(first.quantizer, "unit", False), False),
        "language.decoder.qk_norm": (decoder.qk_norm, "layer"),
        "language.decoder.qkv_bias": (decoder.qkv_bias, False),
        "language.decoder.norm_eps": (decoder.norm_eps, ONLY["rms_norm_eps"]),
        "language.decoder.head_width": (decoder.head_width, decoder.width // decoder.heads),
    }
    require(settings, "Chameleon")


def first_told(first: vqvae.Config) -> dict[str, Any]:
    """The inverse of `first_config`."""
    network, size = first.network, first.image_size
    return {
        "model_type": "chameleon_vqgan",
        "embed_dim": first.quantizer.width,
        "num_embeddings": first.quantizer.size,
        "double_latent": False,
        "latent_channels": first.hidden,
        "resolution": size,
        "in_channels": first.channels,
        "base_channels": network.widths[0],
        "channel_multiplier": [width // network.widths[0] for width in network.widths],
        "num_res_blocks": network.blocks,
        "attn_resolutions": [*heights(attentive(network, size), size)] or None,
        "attn_type": "vanilla",
    }


def names_of(config: chameleon.Config, tokenizer: Tokenizer | None) -> dict[str, int]:
    """The inverse of `tokens_of`, with the token that stands for an image where the tokenizer has one."""
    names = {name: getattr(config, field) for field, name in MARKS.items()}
    for code in range(config.first.quantizer.size):
        names[f"IMGIMG{str(code).translate(str.maketrans(DIGITS, LETTERS))}Z"] = config.code_at + code
    image = None if tokenizer is None else tokenizer.tokenizer.token_to_id(PLACEHOLDER)
    return names if image is None else {**names, PLACEHOLDER: image}


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: chameleon.Config = experiment.model
    check_expressible(config)
    first, decoder = config.first, config.language.decoder
    plain = DecoderConfig(**{**vars(decoder), "qk_norm": "none"})
    image = next((field.image for field in experiment.data.fields if isinstance(field, ImageReader)), Image())
    separated = tokenizer is not None and tokenizer.tokenizer.token_to_id(SEPARATOR) is not None
    return {
        CONFIG: {
            **told_of(replace(config.language, decoder=plain), tokenizer),
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": KIND,
            "swin_norm": isinstance(decoder, PostNormDecoderConfig),
            "bos_token_id": config.bos_id,
            "vq_config": first_told(first),
            "vocabulary_map": names_of(config, tokenizer),
            "torch_dtype": experiment.frozen_dtype or "float32",
        },
        VQGAN + CONFIG: compvis.told_of(first, "Chameleon")[CONFIG],
        PREPROCESSOR: {
            **resizing(image, first.image_size, "ChameleonImageProcessor"),
            "do_rescale": True,
            "rescale_factor": SCALE,
            "do_normalize": True,
            "image_mean": [1.0] * first.channels,
            "image_std": [1.0] * first.channels,
            "do_convert_rgb": first.channels == 3,
        },
        PROCESSOR: {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": (first.image_size // first.network.factor) ** 2,
            "image_token": PLACEHOLDER,
        },
        **({SETTINGS: {"sep_token": SEPARATOR}} if separated else {}),
    }


LAYOUT = Layout(
    name=KIND,
    family="chameleon",
    recognises=lambda source: (
        source.config.get("model_type") == KIND and f"{BODY}embed_tokens.weight" in source.tensors
    ),
    config=config,
    entries=entries,
    fields=fields,
    sampling=lambda config: chameleon.Sampling(top_p=0.9, guidance=3.0, image_guidance=1.2),
    tokenizer=text_tokenizer,
    idle=(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        *(f"{VQGAN}(?:{pattern})" for pattern in compvis.IDLE),
    ),
    fresh=tuple(pattern.replace("^", "^first/") for pattern in FRESH),
    export=export,
    weights={"": "model.safetensors", VQGAN: "model.safetensors"},
)

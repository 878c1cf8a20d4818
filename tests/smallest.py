"""The smallest configuration of each family and of each way that it may go.

RGB images of 2x2 pixels and 3 levels, and texts of 6 tokens.
"""

from dataclasses import replace
from typing import Any

from vlm_jax.models import (
    autoencoder,
    autoregressive,
    chameleon,
    clip,
    diffusion,
    flow,
    gaussian_process,
    inception,
    kde,
    ladder_vae,
    language,
    latent_diffusion,
    llava,
    pixelcnn,
    probability_flow,
    tarflow,
    text_encoder,
    token_autoregressive,
    transfusion,
    vae,
    vdm,
    vqvae,
)
from vlm_jax.models.parts.noised_images import CodedPixels, Latents, Pixels
from vlm_jax.models.parts.own_codes import OwnCodes
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.decoder import DecoderConfig, PostNormDecoderConfig, SeparateDecoderConfig
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.image_patches import ConvolutionalPatches, LinearPatches, UNetPatches
from vlm_jax.nn.pixart import PixArt
from vlm_jax.nn.quantize import EMA, FSQ, LFQ, Learned, Residual, SimVQ
from vlm_jax.nn.t5 import T5
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import LatentUNet, UNet
from vlm_jax.nn.vision import VisionTransformer

DROPOUT = 0.5
NORM_EPS = 0.25
"""Of every norm whose epsilon a configuration holds."""

IMAGE: dict[str, Any] = {"image_size": 2, "channels": 3, "levels": 3}
TRANSFORMER = Transformer(width=8, depth=1, heads=2, mlp=8, norm_eps=NORM_EPS, dropout=DROPOUT, scan=False)
UNET = Network(backbone=UNet(widths=(8,), blocks=1, groups=4, dropout=DROPOUT), classes=2)
DIT = Network(backbone=DiT(patch_size=1, transformer=TRANSFORMER), classes=2)
READERS = {
    "unet": Network(backbone=LatentUNet(widths=(8,), blocks=1, groups=4, dropout=DROPOUT)),
    "pixart": Network(backbone=PixArt(patch_size=1, transformer=TRANSFORMER)),
}
"""Networks that are told texts."""
DECODER = DecoderConfig(
    width=8, depth=1, heads=2, kv_heads=1, head_width=4, mlp=8, norm_eps=NORM_EPS, dropout=DROPOUT, scan=False
)
CLIP = clip.Config(
    image=VisionTransformer(image_size=2, patch_size=1, pre_norm=True, transformer=TRANSFORMER),
    text=clip.TextTransformer(vocab_size=6, context_length=3, eos_id=2, transformer=TRANSFORMER),
    embedding=8,
)
LANGUAGE = language.Config(vocab_size=6, context_length=6, eos_id=2, decoder=DECODER)
LLAVA = llava.Config(
    vision=replace(CLIP.image, features=1, transformer=replace(TRANSFORMER, depth=2)),
    language=LANGUAGE,
    shuffle=2,
    images=2,
)
T5_ENCODER = T5(
    vocab_size=6,
    context_length=3,
    eos_id=2,
    width=8,
    depth=1,
    heads=2,
    head_width=3,
    mlp=8,
    norm_eps=NORM_EPS,
    dropout=DROPOUT,
    scan=False,
)
VAE = vae.Config(**IMAGE, latent=2, widths=(8,), mixtures=1, dropout=DROPOUT)
FLOW = flow.Config(**IMAGE, scales=1, steps=1, width=8, dropout=DROPOUT)
DDPM = diffusion.Config(**IMAGE, network=UNET, timesteps=4, betas="cosine", variance="learned")
STRAIGHT = probability_flow.Config(**IMAGE, network=DIT, likelihood_steps=2)

PYRAMID = Pyramid(widths=(4, 4), blocks=1, attention=(2,), groups=2, dropout=DROPOUT)
VQVAE = vqvae.Config(**IMAGE, network=PYRAMID, hidden=4, quantizer=EMA(size=5, width=2))

AUTOENCODER = autoencoder.Config(**IMAGE, network=PYRAMID, latent=2)
LATENTS: dict[str, Any] = {"image_size": 1, "channels": 2, "levels": None}
"""What that makes of an image, as a prior has them."""

CHAMELEON = chameleon.Config(
    first=VQVAE,
    language=replace(LANGUAGE, vocab_size=12, context_length=8, decoder=replace(DECODER, qk_norm="layer")),
    bos_id=1,
    begin_id=5,
    end_id=6,
    code_at=7,
    images=2,
)

TRANSFUSION = transfusion.Config(
    image=Latents(first=AUTOENCODER, patches=LinearPatches(patch_size=1), timesteps=4, described_timesteps=2),
    language=replace(CHAMELEON.language, vocab_size=7),
    bos_id=1,
    begin_id=5,
    end_id=6,
    images=2,
)

PARTS = ("inception", "text_encoder")
"""Families that are parts of other models: they have neither a loss nor presets. What else a family owes is held for
their smallest configurations."""

CONFIGS: dict[str, Any] = {
    "autoencoder": AUTOENCODER,
    "autoencoder of a critic": autoencoder.Config(
        **{**IMAGE, "image_size": 4}, network=PYRAMID, latent=2, objective=Adversarial(widths=(4,), groups=2)
    ),
    "autoregressive": autoregressive.Config(**IMAGE, patch_size=2, classes=2, transformer=TRANSFORMER),
    "autoregressive of mixtures": autoregressive.Config(**IMAGE, mixtures=1, transformer=TRANSFORMER),
    "chameleon": CHAMELEON,
    "chameleon of norms of branches": replace(
        CHAMELEON,
        language=replace(CHAMELEON.language, decoder=PostNormDecoderConfig(**(vars(DECODER) | {"qk_norm": "layer"}))),
    ),
    "clip": CLIP,
    "siglip": replace(
        CLIP,
        objective="sigmoid",
        image=replace(CLIP.image, pool="attention", pre_norm=False),
        text=replace(CLIP.text, pool="last"),
        projection=False,
    ),
    "diffusion": DDPM,
    "flow": FLOW,
    "flow of learned noise": replace(FLOW, dequantisation="variational", dequantisation_steps=1, masked_width=8),
    "gaussian process": gaussian_process.Config(**IMAGE, kernel="rbf"),
    "inception": inception.Config(image_size=2, size=75, width=16, classes=8),
    "kde": kde.Config(**IMAGE, kernel="discretised"),
    "kde of densities": kde.Config(**IMAGE, kernel="gaussian", queries=2),
    "ladder vae": ladder_vae.Config(
        **IMAGE,
        width=8,
        hidden=8,
        latent=1,
        sizes=(2, 1),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
        mixtures=1,
        dropout=DROPOUT,
    ),
    "language": LANGUAGE,
    "tied language": replace(LANGUAGE, tied=True, decoder=replace(DECODER, qkv_bias=True)),
    "latent diffusion": latent_diffusion.Config(
        first=AUTOENCODER,
        prior=probability_flow.Config(**LATENTS, network=DIT, predict="x", logit_normal=(0.0, 1.0), likelihood_steps=2),
    ),
    "latent diffusion of texts": latent_diffusion.Config(
        first=AUTOENCODER,
        prior=diffusion.Config(
            **LATENTS, network=READERS["pixart"], text=CLIP, timesteps=4, betas="cosine", variance="learned"
        ),
    ),
    "llava": LLAVA,
    "llava of prefixes": replace(
        LLAVA, vision=replace(LLAVA.vision, features=0), projector="linear", shuffle=1, images=1, attention="prefix"
    ),
    "pixelcnn": pixelcnn.Config(**IMAGE, width=8, depth=1, classes=2, dropout=DROPOUT),
    "probability flow": STRAIGHT,
    "edm": replace(STRAIGHT, process="edm"),
    "tarflow": tarflow.Config(**IMAGE, patch_size=1, blocks=2, classes=2, transformer=TRANSFORMER),
    "token autoregressive": token_autoregressive.Config(first=VQVAE, decoder=DECODER, classes=2),
    "token autoregressive of texts": token_autoregressive.Config(
        first=replace(VQVAE, quantizer=FSQ(levels=(3, 4))), decoder=DECODER, text=CLIP
    ),
    "text encoder": text_encoder.Config(network=CLIP.text),
    "text encoder of T5": text_encoder.Config(network=T5_ENCODER),
    "transfusion": TRANSFUSION,
    "transfusion of pixels": replace(
        TRANSFUSION,
        image=Pixels(**IMAGE, patches=ConvolutionalPatches(patch_size=2, channels=2), masked_from=0),
        language=replace(TRANSFUSION.language, decoder=SeparateDecoderConfig(**vars(DECODER))),
    ),
    "transfusion of codes": replace(
        TRANSFUSION,
        image=CodedPixels(
            **IMAGE,
            patches=UNetPatches(widths=(2, 4), blocks=1, groups=2, dropout=DROPOUT),
            codes=OwnCodes(code_at=7, size=3, pool=1),
            masked_from=0,
        ),
        language=replace(TRANSFUSION.language, vocab_size=11, context_length=10),
    ),
    "vae": VAE,
    "vae of a learned prior": replace(VAE, pseudo_inputs=2),
    "vqvae": VQVAE,
    "vqvae of finite scalars": replace(VQVAE, quantizer=FSQ(levels=(3, 4))),
    "vqvae of signs": replace(VQVAE, quantizer=LFQ(width=2)),
    "vqvae of a matrix": replace(VQVAE, quantizer=SimVQ(size=5, width=2)),
    "vqvae of a critic": replace(
        VQVAE,
        image_size=4,
        quantizer=Learned(size=5, width=2, unit=True),
        objective=Adversarial(widths=(4,), groups=2),
    ),
    "vqvae of two books": replace(VQVAE, quantizer=Residual(book=Learned(size=3, width=2, unit=True), books=2)),
    "vdm": vdm.Config(**IMAGE, network=UNET, gamma_min=-5.0, schedule="monotone", fourier=(0,), predict="v"),
    "vdm of texts": vdm.Config(**IMAGE, network=READERS["unet"], text=CLIP, gamma_min=-5.0, fourier=()),
}

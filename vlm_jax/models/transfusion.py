"""Transfusion: one decoder that writes texts by the next token and draws images by diffusion (2408.11039).

In a row an image is a token that begins it, its patches and a token that ends it. Patches attend to one another, and
all else to what is before it. Texts are learned as by a language model; images, in the same pass, as by a model of
diffusion: of the latents of a first stage, which stays as another run left it (`Latents`, the paper's), or of the
pixels themselves, without any other model (`Pixels`).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.models import language
from vlm_jax.models.parts.continuation import Decoding, State, drawn_token
from vlm_jax.models.parts.mixed_network import MixedNetwork
from vlm_jax.models.parts.noised_images import (
    FIRST,
    CodedPixels,
    Latents,
    Pixels,
    check_solving,
    masked_patches,
    noised,
)
from vlm_jax.models.parts.own_codes import TEACHER, begun, moved, nearest, pooled
from vlm_jax.nn.image_patches import reader_rules, writer_rules
from vlm_jax.nn.joint_vocabulary import CODE, JointVocabulary, guided, planned, prompted, streams
from vlm_jax.nn.sequence import (
    attention_mask,
    followed_images,
    image_numbers,
    next_tokens,
    place_images,
    target_images,
)
from vlm_jax.nn.stack import unrolled
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, OnStep, Solving
from vlm_jax.sharding import under
from vlm_jax.trees import assembled, merge


@dataclass(frozen=True, kw_only=True)
class Config:
    """A language model, how it sees and draws images, and the tokens between which they stand."""

    image: Latents | Pixels | CodedPixels
    language: language.Config
    bos_id: int
    """The token that begins a document."""
    begin_id: int
    """The token that begins an image."""
    end_id: int
    """The token that ends an image."""
    images: int = 1
    """Of a row, at most."""
    image_weight: float = 5.0
    """Of the squared error of a patch, where the negative log-likelihood of a token weighs 1. The loss is a mean over
    both, for which micro-steps are exact. The paper's is the mean over tokens and 5 times that over images (equation 4
    and section 4.1): of rows with T target tokens and P patches that is the same for a weight of 5 T / P, which is 5 of
    the paper's data, half of which are tokens of texts. The metric `text_share` is T / (T + P)."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"images is {self.images}: a row must have room for 1 at least")
        if not 0 < self.image_weight < math.inf:
            raise UserError(f"image_weight is {self.image_weight}: it must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class Sampling(language.Sampling, Solving):
    """How texts are written and images drawn."""

    steps: int = 250
    """Of an image (2408.11039, section 4.1)."""
    image_guidance: float | None = None
    """Guidance of what the images before it say, from which `guidance` then goes on to what the texts say (2211.09800,
    section 3.2.1); None: one guidance for both."""
    code_guidance: float = 2.0
    """Of a model that names codes before it draws: of these, away from those of an image that is told nothing. The
    other guidance is then away from neither text nor codes (2605.31604)."""

    def __post_init__(self) -> None:
        language.Sampling.__post_init__(self)
        Solving.__post_init__(self)
        for name in ("image_guidance", "code_guidance"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise UserError(f"sampling.{name} is {value}: it must be a number, at least 0")
        if self.guidance_rescale:
            raise UserError("sampling.guidance_rescale is of models of images alone: leave it at 0")

    def guidances_at(self, level: tuple[Array, Array]) -> tuple[Any, Any]:
        """Of texts and of images, at a level of noise."""
        of = self.image_guidance
        return self.guidance_at(level), None if of is None else replace(self, guidance=of).guidance_at(level)


def build(config: Config) -> Model:
    """A density over the target tokens of a row, and a bound on that of its target images where there is one."""
    c, images = config.language, noised(config.image)
    path, patches = images.path, config.image.patches
    length = (images.shape[0] // patches.patch_size) ** 2
    coder = config.image.codes if isinstance(config.image, CodedPixels) else None
    codes, named = (0, (c.vocab_size, 0)) if coder is None else (coder.of(length), (coder.code_at, coder.size + 1))
    span = 1 + codes + length + 1
    vocabulary = JointVocabulary(c.vocab_size, *named, config.bos_id, c.eos_id, config.begin_id, config.end_id)
    vocabulary.check()
    if span + 2 >= c.context_length:
        raise UserError(
            f"an image takes {span} places and the context_length is {c.context_length}: choose a longer one, or "
            f"larger patches"
        )
    marks = jnp.zeros(span, jnp.int32).at[1 : 1 + codes].set(0 if coder is None else coder.untold)
    marks = marks.at[0].set(config.begin_id).at[-1].set(config.end_id)
    masked_from = math.inf
    if isinstance(config.image, Pixels) and config.image.masked_from is not None:
        masked_from = config.image.masked_from
    # linen types what `apply` returns as a union
    module: Any = MixedNetwork(c, patches, images.shape[-1], length, codes, masked_from < math.inf)

    def init(key: Array, batch: Batch) -> Variables:
        first_key, own_key = jax.random.split(key)
        x = jnp.zeros((*batch["image_at"].shape, *images.shape))
        masked = jnp.zeros((*x.shape[:2], length), bool) if module.masks else None
        own = module.init(own_key, batch, x, jnp.zeros(x.shape[:2]), masked)
        if coder is not None:
            own = {**own, TEACHER: begun(first_key, own["params"], coder.size, c.decoder.width)}
        if images.first is None:
            return own
        first = images.first.init(first_key, {"image": batch["image"][:, 0]})
        return merge(own, assembled({FIRST: first}))

    def stage(variables: Variables, image: Int[Array, "B N H W C"]) -> Float[Array, "B N h w M"]:
        kept = images.stage(variables, image.reshape(-1, *image.shape[2:]))
        return kept.reshape(*image.shape[:2], *kept.shape[1:])

    def drawn_of(kept: Float[Array, "B N h w M"], key: Array | None = None) -> Float[Array, "B N h w c"]:
        x = images.drawn(kept.reshape(-1, *kept.shape[2:]), key)
        return x.reshape(*kept.shape[:2], *x.shape[1:])

    def still(shape: int | tuple[int, ...]) -> Float[Array, "*N"]:
        """The time of images without noise."""
        return jnp.full(shape, path.time(path.solved_times(1)[-1]), jnp.float32)

    def marked(batch: Batch, told: Int[Array, "B N M"] | None = None) -> dict[str, Array]:
        """With the tokens around each image, and those of its codes."""
        own = jnp.tile(marks, (*batch["image_at"].shape, 1))
        if told is not None:
            own = own.at[..., 1 : 1 + codes].set(told)
        tokens = place_images(batch["tokens"][..., None], own[..., None], batch["image_at"])
        return {**batch, "tokens": tokens[..., 0]}

    def predicted(batch: Batch, named: Bool[Array, "B N"] | None = None) -> Bool[Array, "B T"]:
        """Places whose next token is a target: of a text, what begins an image, or a code of images that are named."""
        places = batch["tokens"].shape[1]
        target = batch["target"] & (image_numbers(batch["image_at"] + 1, span - 1, places) < 0)
        if named is not None:
            image = image_numbers(batch["image_at"] + 1, codes, places)
            target |= jnp.take_along_axis(named, jnp.maximum(image, 0), axis=1) & (image >= 0)
        return next_tokens(batch["tokens"], target, batch["segment"])[1]

    def own_codes(variables: Variables, x: Float[Array, "B N h w c"]) -> tuple[Int[Array, "B N M"], Array]:
        """Tokens of what the copy sees in images, and its pooled features."""
        assert coder is not None
        teacher, flat = variables[TEACHER], x.reshape(-1, *images.shape)
        seen = module.apply({"params": teacher["params"]}, flat, still(len(flat)), method="look")
        seen = jax.lax.stop_gradient(pooled(seen, coder.pool))
        return coder.code_at + nearest(seen, teacher["prototypes"]).reshape(*x.shape[:2], codes), seen

    def described(batch: Batch) -> Bool[Array, "B N"]:
        """Images that target tokens of a text follow, beside its end."""
        outside = image_numbers(batch["image_at"], span, batch["tokens"].shape[1]) < 0
        text = batch["target"] & (batch["segment"] > 0) & outside & (batch["tokens"] != c.eos_id)
        return followed_images(text, batch["segment"], batch["image_at"])

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """A mean over target tokens, of nats, and over patches of target images, of `image_weight` squared errors.

        Among the metrics are its two parts, and the share of what it is a mean over that are tokens.
        """
        latent_key, time_key, noise_key, mask_key, code_key, dropout_key = jax.random.split(key, 6)
        x = drawn_of(batch["stage"] if "stage" in batch else stage(variables, batch["image"]), latent_key)
        rows, flat = x.shape[:2], x.reshape(-1, *images.shape)
        target, followed = target_images(batch).reshape(-1), described(batch).reshape(-1)
        t, learned, counts = images.times(time_key, target, followed, train=train)
        eps, learned = jax.random.normal(noise_key, flat.shape), learned.reshape(rows)
        x_t, time = path.noisy(flat, t, eps).reshape(x.shape), path.time(t).reshape(rows)
        hidden = learned & (step >= masked_from)
        masked = masked_patches(mask_key, hidden, length) if module.masks and train else None
        state = {collection: tree for collection, tree in variables.items() if collection != "params"}
        told, named = None, None
        if coder is not None:
            own, features = own_codes(variables, x)
            named = learned & ~jax.random.bernoulli(code_key, coder.dropout if train else 0.0, rows)
            told = jnp.where(named[..., None], own, coder.untold)
            if train:
                there = (batch["image_at"] < batch["tokens"].shape[1]).reshape(-1)
                state[TEACHER] = moved(variables[TEACHER], variables["params"], features, there, coder)
        batch = marked(batch, told)
        found, output = module.apply(variables, batch, x_t, time, masked, train=train, rngs={"dropout": dropout_key})
        squared = path.squared_error(output.reshape(flat.shape), flat, eps, t)
        error = (counts * jnp.mean(squared, axis=(1, 2, 3))).reshape(rows)
        texts = predicted(batch, named)
        tokens = jnp.sum(texts, dtype=jnp.float32)
        weight = tokens + length * jnp.sum(learned, dtype=jnp.float32)
        divisor = jnp.where(weight > 0, weight, 1)
        text = -jnp.sum(jnp.where(texts, found.log_prob, 0)) / divisor
        image = config.image_weight * length * jnp.sum(jnp.where(learned, error, 0)) / divisor
        return text + image, Aux({"text": text, "image": image, "text_share": tokens / divisor}, weight, state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the target tokens of each row, exactly, and of its target images a bound; each given what it attends to.

        Images that are given have no noise, so that each that is a target takes passes of its own.
        """
        assert images.log_likelihood is not None
        blank = batch = marked(batch)
        x, target = drawn_of(stage(variables, batch["image"])), target_images(batch)
        clean, everything = still(x.shape[:2]), predicted(batch)
        mine = None if coder is None else own_codes(variables, x)[0]
        found, _ = module.apply(variables, batch, x, clean)
        total = jnp.sum(jnp.where(everything, found.log_prob, 0), axis=1)
        for n in range(config.images):
            if coder is not None and mine is not None:
                named = target & (jnp.arange(config.images) == n)
                batch = marked(blank, jnp.where(named[..., None], mine, coder.untold))
                found, _ = module.apply(variables, batch, x, clean)
                total += jnp.sum(jnp.where(predicted(batch, named) & ~everything, found.log_prob, 0), axis=1)

            def output(x_t: Array, t: Array, n: int = n, batch: Batch = batch) -> Array:
                noisy, time = x.at[:, n].set(x_t), clean.at[:, n].set(path.time(t))
                return module.apply(variables, batch, noisy, time)[1][:, n]

            own = images.log_likelihood(variables, batch["image"][:, n], output, jax.random.fold_in(key, n))
            total += jnp.where(target[:, n], own, 0)
        return total

    def count(batch: Batch) -> Int[Array, " B"]:
        """The target tokens of each row's texts, and the sub-pixels of its target images."""
        inside = image_numbers(batch["image_at"], span, batch["tokens"].shape[1])
        texts = predicted(batch) & (jnp.roll(inside, -1, axis=1) < 0)
        pixels = math.prod(images.image.shape) * jnp.sum(target_images(batch), axis=1, dtype=jnp.int32)
        return jnp.sum(texts, axis=1, dtype=jnp.int32) + pixels

    def generate(
        variables: Variables,
        key: Array,
        batch: Batch,
        *,
        order: tuple[str, ...] = ("text",),
        temperature: float = 1.0,
        sampling: Sampling = Sampling(),
        on_step: OnStep | None = None,
    ) -> dict[str, Array]:
        """Goes on with the last document of each row, which is padded on the left.

        A text takes `sampling.length` tokens at most: each ends where an image begins, and the last with `eos_id`
        too. What is drawn is the target; it follows the prompt without gaps, and padding follows it. Images that
        are drawn are the last ones of `image`; `on_step` sees what is noised of them.
        """
        plan = planned(batch, order, context=c.context_length, length=sampling.length, codes=codes + length)
        if plan.images:
            check_solving(config.image, sampling)
        batch, rows = marked(batch), len(batch["tokens"])
        away = sampling.code_guidance if coder is not None and sampling.guidance == 1 else sampling.guidance
        seen = streams(batch, span, away, sampling.image_guidance)[: None if plan.images else 1]
        params = variables["params"]
        d, stack = unrolled(c.decoder, params["language"]["decoder"])
        unstacked: Any = module.clone(config=replace(c, decoder=d))
        own = {"params": {**params, "language": {**params["language"], "decoder": stack}}}

        def call(method: str, *args: Any) -> Any:
            return unstacked.apply(own, *args, method=method)

        embed, feed, logits = (partial(call, method) for method in ("embed", "feed", "logits"))
        decoding = Decoding(embed, feed, logits, seen, plan, vocabulary)

        def untold(state: State, place: Array) -> tuple[State, None]:
            return decoding.told(state, jnp.full(rows, marks[1]), place), None

        def coded(state: State, start: int, key: Array) -> State:
            """After an image's codes, which what is told nothing is not told either."""
            assert coder is not None
            legal = vocabulary.legal()[CODE] & (jnp.arange(c.vocab_size) != coder.untold)
            places = start + jnp.arange(codes)

            def name(state: State, place: Array) -> tuple[State, Array]:
                logits = guided(jnp.split(state.logits, len(seen)), sampling.code_guidance, sampling.image_guidance)
                own = jax.random.fold_in(key, place)
                code = drawn_token(own, logits, legal[None], temperature=temperature, sampling=sampling)
                return decoding.told(state, code, place), code

            def hide(state: State, told: tuple[Array, Array]) -> tuple[State, None]:
                place, code = told
                hidden = jnp.full(rows * (len(seen) - 1), coder.untold, jnp.int32)
                return decoding.told(state, jnp.concatenate([code, hidden]), place), None

            state, named = jax.lax.scan(name, state, places)
            return state if len(seen) == 1 else jax.lax.scan(hide, state, (places, named))[0]

        def drawn(state: State, start: int, key: Array) -> tuple[State, Int[Array, "B S"], Array]:
            """After an image, its tokens, and the image."""
            noise_key, solver_key, code_key = jax.random.split(key, 3)
            state = state.holding(start, span)
            state = decoding.told(state, jnp.full(rows, config.begin_id, jnp.int32), start)
            first = start + 1 + codes
            if coder is not None:
                state = coded(state, start + 1, code_key)

            def denoise(x: Array, t: Array) -> Denoised:
                y, sight = call("patches", x, jnp.full(rows, path.time(t), jnp.float32))
                hidden, _ = decoding.fed(state, y, first, inside=True)
                outputs = [call("image", each, sight) for each in jnp.split(hidden, len(seen))]
                data = [path.data(output, x, jnp.broadcast_to(t, (rows,))) for output in outputs]
                return Denoised(guided(data, *sampling.guidances_at(path.level(t))))

            x = temperature * jax.random.normal(noise_key, (rows, *images.shape))
            solve, at = SOLVERS[sampling.solver], path.solved_times(sampling.steps)
            x = solve(denoise, path.level, at, x, solver_key, temperature=temperature, on_step=on_step)
            image = images.show(variables, x)
            tokens = jnp.tile(marks, (rows, 1))
            if start + span == len(plan.kind):
                return state, tokens, image
            # Pixels are read as they are given out, latents as they were drawn.
            x = images.stage(variables, image) if images.first is None else x
            if coder is not None:  # what is read is told none
                state, _ = jax.lax.scan(untold, state, start + 1 + jnp.arange(codes))
            _, cache = decoding.fed(state, call("patches", x, still(rows))[0], first, inside=True)
            state = state._replace(cache=cache)
            return decoding.told(state, tokens[:, -1], start + span - 1), tokens, image

        x = drawn_of(stage(variables, batch["image"]))
        at = batch["image_at"] + 1 + codes
        y, _ = call("patches", x.reshape(-1, *images.shape), still(at.size))
        inside = image_numbers(at, length, batch["tokens"].shape[1])
        y = place_images(call("embed", batch["tokens"]), y.reshape(*at.shape, *y.shape[1:]), at)
        state = decoding.begun(y, attention_mask(batch["segment"], inside), inside >= 0, d)
        return decoding.continued(state, batch, order, drawn, key, temperature=temperature, sampling=sampling)

    def sample(
        variables: Variables,
        key: Array,
        given: Batch,
        *,
        num: int,
        temperature: float = 1.0,
        sampling: Sampling,
        on_step: OnStep | None = None,
    ) -> Int[Array, "num H W C"]:
        """An image of a document that begins with a text, or with nothing. `on_step` sees what is noised."""
        tokens = given["tokens"] if "tokens" in given else jnp.full((num, 1), config.bos_id, jnp.int32)
        begun = prompted(tokens, c.eos_id, images=(config.images, *images.image.shape))
        settings: dict[str, Any] = {"temperature": temperature, "sampling": sampling, "on_step": on_step}
        return generate(variables, key, begun, order=("image",), **settings)["image"][:, -1]

    density: dict[str, Any] = {"log_likelihood": log_likelihood, "count": count, "bound": "lower"}
    return Model(
        inputs=language.inputs_with_images(c, images.image, config.images, span),
        init=init,
        loss=loss,
        rules=(
            *(() if images.first is None else under(FIRST, images.first.rules)),
            *under("reader", reader_rules(config.image.patches)),
            *under("writer", writer_rules(config.image.patches)),
            *under("language", language.rules_of(c)),
            *(((r"^mask$", (None,)),) if module.masks else ()),
        ),
        stage=None if images.first is None else stage,
        conditions={"tokens": Input((c.context_length - span,), "int32", c.vocab_size, contains=c.eos_id)},
        sampling=default_sampling(config.image),
        sample=sample,
        generate=generate,
        **(density if images.log_likelihood is not None else {}),
    )


def default_sampling(image: Latents | Pixels) -> Sampling:
    """As many steps of a chain as the paper takes, or as there are; JiT's of a straight path."""
    return (
        Sampling(steps=min(250, image.timesteps)) if isinstance(image, Latents) else Sampling(solver="heun", steps=50)
    )

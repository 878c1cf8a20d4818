"""Going on with rows of texts and images, a place after the other, through one cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Batch
from vlm_jax.models.language import Sampling
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.nn.joint_vocabulary import BEGIN, JointVocabulary, Plan
from vlm_jax.sampling.autoregressive import draw_token


class State(NamedTuple):
    """What is known when some of the places have been filled."""

    cache: tuple[Cache, ...]
    real: Bool[Array, "B S"]
    """Which of the places hold something: those of a text that has ended do not."""
    logits: Float[Array, "R V"]
    """Of the token at the next place, of every stream."""

    def holding(self, start: int, length: int) -> "State":
        """With something in so many places."""
        return self._replace(real=self.real.at[:, start : start + length].set(True))


class Decoding(NamedTuple):
    """Functions of a model, its parameters among them. R rows are those of the batch, once for each of `streams`."""

    embed: Callable[[Int[Array, "R n"]], Float[Array, "R n D"]]
    feed: Callable[..., tuple[Float[Array, "R n D"], tuple[Cache, ...]]]
    """`(y, position, mask, cache, slot, inside) -> (hidden, cache)`; `inside` bool [R, n] is of an image's places."""
    logits: Callable[[Float[Array, "R D"]], Float[Array, "R V"]]
    seen: list[Bool[Array, "B T"]]
    """What of the prompt each stream attends to."""
    plan: Plan
    vocabulary: JointVocabulary

    @property
    def given(self) -> int:
        """Places of the prompt."""
        return self.seen[0].shape[1]

    def begun(
        self, y: Float[Array, "B T D"], mask: Bool[Array, "B 1 T T"], inside: Bool[Array, "B T"], sizes: DecoderConfig
    ) -> State:
        """After the prompt.

        Args:
          y: what stands in its places.
          mask: which of them attend to which.
        """
        count, more, d = len(self.seen), len(self.plan.kind), sizes
        room = count * len(y), self.given + more, d.kv_heads, d.head_width
        cache = empty_cache(*room, layers=d.depth, dtype=d.dtype)
        prompt = jnp.concatenate(self.seen)
        mask = jnp.tile(mask, (count, 1, 1, 1)) & prompt[:, None, None]
        at = jnp.maximum(jnp.cumsum(prompt, axis=1, dtype=jnp.int32) - 1, 0)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, more)))
        y, inside = jnp.tile(y, (count, 1, 1)), jnp.tile(inside, (count, 1))
        hidden, cache = self.feed(y, at, mask, cache, 0, inside)
        return State(cache, jnp.zeros((len(prompt) // count, more), bool), self.logits(hidden[:, -1]))

    def fed(
        self, state: State, y: Float[Array, "_ n D"], place: Int[Array, ""] | int, *, inside: bool = False
    ) -> tuple[Float[Array, "R n D"], tuple[Cache, ...]]:
        """What the model makes of what stands from a place on, whose parts attend to one another.

        Args:
          y: the same for all streams, or of each.
        """
        count, n = len(self.seen), y.shape[1]
        y = jnp.tile(y, (count * len(state.real) // len(y), 1, 1))
        segment, slot = jnp.asarray(self.plan.segment), self.given + place
        in_image = jnp.array([each >= BEGIN for each in self.plan.kind])
        kept = (state.real, state.real & (segment == segment[place]), state.real & in_image)
        keys = jnp.concatenate([jnp.concatenate(each, axis=1) for each in zip(self.seen, kept[:count], strict=True)])
        slots = jnp.arange(keys.shape[1])
        before = keys & (slots < slot)
        at = jnp.sum(before, axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(n)
        mask = before | ((slots >= slot) & (slots < slot + n))
        mask = jnp.broadcast_to(mask[:, None, None], (len(y), 1, n, keys.shape[1]))
        return self.feed(y, at, mask, state.cache, slot, jnp.full(y.shape[:2], inside))

    def told(self, state: State, token: Int[Array, " _"], place: Int[Array, ""] | int) -> State:
        """After a token at a place, the same for all streams, or one of each."""
        hidden, cache = self.fed(state, self.embed(token[:, None]), place)
        return State(cache, state.real, self.logits(hidden[:, 0]))

    def written(
        self, state: State, start: int, key: Array, *, temperature: float, sampling: Sampling
    ) -> tuple[State, Int[Array, "B n"]]:
        """After the text that begins at `start`: until its end, or the token that begins an image, not of it."""
        told: dict[str, Any] = {"temperature": temperature, "sampling": sampling}
        kind = self.plan.kind[start]
        allowed, v = self.vocabulary.legal()[kind], self.vocabulary
        count = self.plan.segment.count(self.plan.segment[start])
        rows = len(state.real)

        def step(carry: tuple[State, Array], place: Array) -> tuple[tuple[State, Array], Array]:
            state, over = carry
            token = drawn_token(jax.random.fold_in(key, place), state.logits[:rows], allowed[None], **told)
            held = ~over & (token != v.begin_id)
            state = state._replace(real=state.real.at[:, place].set(held))
            return (self.told(state, token, place), ~held | (token == v.eos_id)), token

        (state, _), tokens = jax.lax.scan(step, (state, jnp.zeros(rows, bool)), start + jnp.arange(count))
        return state, tokens.T

    def continued(
        self,
        state: State,
        batch: Batch,
        order: tuple[str, ...],
        draw: Callable[[State, int, Array], tuple[State, Int[Array, "B S"], Array]],
        key: Array,
        *,
        temperature: float,
        sampling: Sampling,
    ) -> dict[str, Array]:
        """The rows with a segment of each modality that the order names.

        Args:
          draw: `(state, start, key) -> (state, tokens, image)`: after the image that begins at `start`.
        """
        found, images = [], dict[int, Array]()
        for number, kind in enumerate(order):
            start, own = self.plan.segment.index(number), jax.random.fold_in(key, number)
            if kind == "text":
                state, tokens = self.written(state, start, own, temperature=temperature, sampling=sampling)
            else:
                state, tokens, images[start] = draw(state, start, own)
            found.append(tokens)
        return continued_batch(batch, jnp.concatenate(found, axis=1), state.real, images)


def drawn_token(
    key: Array, logits: Float[Array, "B V"], allowed: Bool[Array, "#B V"], *, temperature: float, sampling: Sampling
) -> Int[Array, " B"]:
    """One of those that are allowed, as the settings say."""
    settings: dict[str, Any] = {"top_k": sampling.top_k, "top_p": sampling.top_p, "temperature": temperature}
    return draw_token(key, logits, allowed=allowed, **settings)


def continued_batch(
    batch: Batch, tokens: Int[Array, "B S"], real: Bool[Array, "B S"], images: dict[int, Array]
) -> dict[str, Array]:
    """The fields of rows with what was drawn: the target, without gaps after the prompt, and after it padding.

    Args:
      images: of the places where they begin, the images that were drawn.
    """
    given, more = batch["tokens"].shape[1], tokens.shape[1]
    order, kept = jnp.argsort(~real, axis=1, stable=True), jnp.sort(real, axis=1, descending=True)
    places = [given + jnp.sum(real[:, :start], axis=1, dtype=jnp.int32) for start in images]
    before = jnp.where(batch["image_at"] < given, batch["image_at"], given + more)
    return {
        "tokens": jnp.concatenate([batch["tokens"], jnp.take_along_axis(tokens, order, axis=1)], axis=1),
        "target": jnp.concatenate([jnp.zeros_like(batch["tokens"], bool), kept], axis=1),
        "segment": jnp.concatenate([batch["segment"], jnp.where(kept, batch["segment"][:, -1:], 0)], axis=1),
        "image": jnp.concatenate([batch["image"], *(each[:, None] for each in images.values())], axis=1),
        "image_at": jnp.concatenate([before, *(each[:, None] for each in places)], axis=1),
    }

"""Language models."""

from dataclasses import replace

from vlm_jax.data import Data, Document, Text
from vlm_jax.experiment import Experiment
from vlm_jax.models import language
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def language_tiny() -> Experiment:
    """Names of emoji, and questions about shapes with their answers; minutes on a CPU.

    `python -m experiments.run language-tiny`, then `python -m tools.evaluate runs/language-tiny`: held-out perplexity
    6.61 ± 0.76 of names, of which the 3-gram has 8.00 ± 0.81 and needs 0.28 ± 0.04 bits a token more; with `--data.name
    easy_vqa` 2.017 ± 0.007 of questions and answers, of which it has 2.187 ± 0.007.
    """
    return Experiment(
        model=language.Config(
            vocab_size=512,
            context_length=64,
            eos_id=2,
            tied=True,
            decoder=DecoderConfig(
                width=96, depth=3, heads=4, kv_heads=2, head_width=24, mlp=256, dropout=0.3, scan=False
            ),
        ),
        data=Data(
            name="openmoji",
            mixture=(("easy_vqa", 0.5),),
            train="train[:95%]",
            validation="train[95%:]",
            fields=(Document(),),
            pack=True,
            text=Text(vocab_size=512),
        ),
        training=Training(
            optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50, weight_decay=0.3, b2=0.98, eps=1e-6),
            ema_decay=0.99,
            steps=900,
            batch_size=16,
            checkpoint_every=100,
        ),
    )


def published(
    model: language.Config, *, learning_rate: float, weight_decay: float, eps: float, steps: int, batch_size: int
) -> Experiment:
    """A published size, on packed text that TFDS has prepared."""
    return Experiment(
        model=model,
        data=Data(
            name="wiki40b/en",
            validation="validation",
            fields=(Document(),),
            pack=True,
            text=Text(vocab_size=model.vocab_size, tokenizer="tokenizer.json"),
        ),
        training=Training(
            optimizer=Optimizer(
                learning_rate=learning_rate, warmup_steps=2000, weight_decay=weight_decay, b2=0.95, eps=eps
            ),
            steps=steps,
            batch_size=batch_size,
            log_every=50,
            checkpoint_every=2000,
        ),
    )


def language_llama2_7b() -> Experiment:
    """Llama 2 7B (2307.09288, table 1 and section 2.2): 6.7B parameters, 2 trillion tokens in batches of 4 million.

    Its rate falls to a tenth of its peak, ours to zero. Needs its tokenizer.json (--data.text.tokenizer), a data set
    of text prepared by TFDS (--data.name), and --mesh.fsdp.
    """
    model = language.LLAMA_2_7B
    return published(model, learning_rate=3e-4, weight_decay=0.1, eps=1e-5, steps=476_837, batch_size=1024)


def language_llama3_2_1b() -> Experiment:
    """Llama 3.2 1B (2407.21783, and its release): 1.24B parameters, one table for what is read and predicted.

    For weights that are released; how they were trained is not published, and these settings are for training on.
    Needs what Llama 2 does.
    """
    model = replace(language.LLAMA_3_2_1B, context_length=8192)
    return published(model, learning_rate=1e-5, weight_decay=0.1, eps=1e-8, steps=10_000, batch_size=128)


def language_qwen2_5_0_5b() -> Experiment:
    """Qwen2.5 0.5B (2412.15115, table 1, and its release): 494M parameters, biases on queries, keys and values.

    For weights that are released, as Llama 3.2's.
    """
    model = replace(language.QWEN_2_5_0_5B, context_length=4096)
    return published(model, learning_rate=1e-5, weight_decay=0.1, eps=1e-8, steps=10_000, batch_size=128)


PRESETS = (language_tiny, language_llama2_7b, language_llama3_2_1b, language_qwen2_5_0_5b)

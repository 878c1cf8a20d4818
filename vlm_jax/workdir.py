"""A run's directory: the names in it, who writes there, and what it holds: a model, its variables, its tokenizer."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from filelock import Timeout
from jax.sharding import Mesh

from vlm_jax.chat import Shown, Speaker, chat
from vlm_jax.contract import Model, Variables, abstract_batch
from vlm_jax.data import Tokenizer, load_tokenizer
from vlm_jax.data.tokenizer import files_of
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record, model_of
from vlm_jax.files import parse_json, replace_file
from vlm_jax.identity import as_begun, changes, identity, listed
from vlm_jax.locks import exclusive
from vlm_jax.lora import merged, without_adapters
from vlm_jax.models import build
from vlm_jax.paths import local_path
from vlm_jax.records import to_json
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.checksums import MANIFEST
from vlm_jax.train.frozen import FROZEN, restore_frozen
from vlm_jax.train.layout import laid_out
from vlm_jax.train.saved import check_path, saved_steps
from vlm_jax.train.step import TrainState, eval_variables

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


@dataclass(frozen=True)
class Loaded:
    """A trained model and what belongs to it."""

    model: Model
    variables: Variables
    """With averaged parameters where the run kept an average, and adapters merged into the kernels."""
    tokenizer: Tokenizer | None
    experiment: Experiment
    step: int
    """Of the checkpoint that the variables come from."""

    def chat(
        self,
        prompts: Sequence[str],
        images: Sequence[Shown] | None = None,
        sampling: Any = None,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> list[str]:
        """The answer to each prompt, to all of which all images belong, in order: their files, or uint8 [H, W, 3].

        They stand where a prompt says `<image>`, or, where it does not, in front of it. A prompt is set into the chat
        template by which the run was trained, else into its tokenizer's own; a language model without one goes on with
        the text. An empty prompt asks for a caption.

        Args:
          sampling: of the type of `model.sampling`; None: the run's.
          temperature: 1: draw from the model; lower: with less noise, down to 0: the likeliest.

        Raises:
          UserError: as `vlm_jax.chat.chat`.
        """
        return chat(self.speaker(sampling), prompts, images or (), temperature=temperature, seed=seed)

    def speaker(self, sampling: Any = None) -> Speaker:
        """The run as one that is asked."""
        sampling = self.experiment.sampling if sampling is None else sampling
        return Speaker(self.model, self.variables, self.tokenizer, self.experiment.data.fields, sampling)


def load(workdir: str | Path, *, step: int | None = None, mesh: Mesh | None = None) -> Loaded:
    """Loads a run from its directory and the installed package alone.

    Args:
      step: of a checkpoint; None: the one of least validation loss where the run kept score, else the newest.
      mesh: where to lay out the variables, by the model's rules; None: on the first device.

    Raises:
      UserError: `workdir` is not the directory of a run, or has no such or no sound checkpoint, or what is in it does
        not belong together.
    """
    workdir = local_path(workdir)
    experiment = from_record(read_record(workdir))
    if not has_checkpoints(workdir):
        raise UserError(f"{workdir} has no checkpoint yet: let the run reach its first one")
    tokenizer = None if experiment.data.text is None else read_tokenizer(workdir)
    directory, facts = workdir / CHECKPOINTS, read_identity(workdir)
    with Checkpoints(directory, read_only=True, identity=facts) as checkpoints:
        model = model_of(experiment)
        abstract = abstract_state(model, experiment, mesh)
        # Where there is an average, it stands for the parameters that it covers.
        name = "ema" if abstract.ema else "params"
        items = {name: getattr(abstract, name), "collections": abstract.collections}
        restored = checkpoints.restore(items, checkpoints.best_step() if step is None else step)
    assert restored is not None
    step, values = restored
    state = abstract._replace(**values, frozen=restore_frozen(directory, abstract.frozen, facts))
    variables = eval_variables(state)
    if experiment.lora.rank is not None:
        layout = jax.tree.map(lambda leaf: leaf.sharding, without_adapters(eval_variables(abstract)))
        variables = jax.jit(partial(merged, config=experiment.lora), out_shardings=layout)(variables)
        model = build(experiment.model)
    return Loaded(model, variables, tokenizer, experiment, step)


def abstract_state(model: Model, experiment: Experiment, mesh: Mesh | None) -> TrainState:
    """The shapes of a run's state, and where each array lies; without what its optimizer keeps."""
    state, _ = laid_out(
        model,
        optax.identity(),
        abstract_batch(model.inputs, experiment.training.batch_size),
        make_mesh(MeshShape(), jax.local_devices()[:1]) if mesh is None else mesh,
        frozen=experiment.frozen,
        frozen_dtype=experiment.frozen_dtype,
        ema_decay=experiment.training.ema_decay,
    )
    return state


def read_record(workdir: Path) -> dict[str, Any]:
    """What `to_record` made, from the directory of a run.

    Raises:
      UserError: `workdir` is not the directory of a run, or its record is damaged.
    """
    path = workdir / CONFIG
    try:
        record = parse_json(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        identity(record)  # fails where it is nested too deep
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is not the directory of a run: it has no {CONFIG}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy, or train anew elsewhere") from error
    if "optimizer" in record:
        raise UserError(
            f"{path} was written by an earlier version of vlm_jax, which kept the settings of training beside the "
            f"model: use that version, or train anew elsewhere"
        )
    return record


def read_identity(workdir: Path) -> dict[str, str]:
    """The facts that make the run of a directory this run and no other, its tokenizer's digest among them.

    Raises:
      UserError: `workdir` is not the directory of a run, or a file there cannot be read.
    """
    facts = identity(read_record(workdir))
    path = workdir / TOKENIZER
    try:
        contents = b"".join(file.read_bytes() for file in files_of(path))
        facts[TOKENIZER] = hashlib.blake2b(contents, digest_size=16).hexdigest()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that") from error
    return facts


def read_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer that a run began with.

    Raises:
      UserError: it is not there, or is none.
    """
    if not (workdir / TOKENIZER).exists():
        raise UserError(f"{workdir} has lost its {TOKENIZER}, which gives its tokens their meaning: copy it back")
    return load_tokenizer(workdir / TOKENIZER)


def taken_from(workdir: Path, step: int | None) -> dict[str, Any]:
    """The step of a run that another one begins with, as `load` chooses it, and the digest of what is saved there.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    directory = workdir / CHECKPOINTS
    if not has_checkpoints(workdir):
        raise UserError(f"{workdir} has no checkpoint yet: let the run reach its first one")
    with Checkpoints(directory, read_only=True, identity=read_identity(workdir)) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        step = checkpoints.steps()[-1] if step is None else step
    manifests = [directory / str(step) / MANIFEST, directory / FROZEN / "0" / MANIFEST]
    try:
        there = [manifest.read_bytes() for manifest in manifests[: 2 if manifests[1].exists() else 1]]
    except OSError as error:
        raise UserError(f"{manifests[0]} cannot be read ({error.strerror}): choose another start.step") from error
    # A manifest holds the checksum of every file, and what run it is of.
    return {"step": step, "digest": hashlib.blake2b(b"".join(there), digest_size=16).hexdigest()}


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything was saved in the directory of a run."""
    return bool(saved_steps(workdir / CHECKPOINTS))


@contextlib.contextmanager
def claimed_workdir(workdir: Path, record: dict[str, Any]) -> Iterator[None]:
    """Makes `workdir` this run's for as long as the context lasts, and writes the record into it.

    The directory belongs to a configuration from the first checkpoint on: before it there is nothing to lose. Of a run
    that an earlier version began, the record stays without the fields that it did not know, as the manifests of its
    checkpoints are; here they must have their defaults.

    Raises:
      UserError: another process is writing there, or the directory belongs to another configuration, which the
        message shows; or it cannot be written.
    """
    check_path(workdir / CHECKPOINTS, read_only=False)
    with contextlib.ExitStack() as stack:
        with failure_told(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(exclusive(workdir / LOCK, timeout=0))
            except Timeout as error:
                raise UserError(
                    f"another process is writing to {workdir} (it holds {error.lock_file}): wait for it, stop it, or "
                    f"choose another --workdir"
                ) from error
            if has_checkpoints(workdir):
                begun = read_record(workdir)
                if found := changes(identity(begun | to_json(from_record(begun))), identity(record)):
                    raise UserError(
                        f"{workdir} belongs to another configuration ({listed(found)}): choose another --workdir, or "
                        f"give these the values that they had"
                    )
                record = as_begun(record, identity(record).keys() - identity(begun).keys())
            text = json.dumps(record, indent=2) + "\n"
            replace_file(workdir / CONFIG, lambda temporary: temporary.write_text(text))
        yield


def write_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Keeps the tokenizer that a run begins with.

    Raises:
      UserError: it cannot be written.
    """
    with failure_told(workdir):
        tokenizer.save(workdir / TOKENIZER)


@contextlib.contextmanager
def failure_told(workdir: Path) -> Iterator[None]:
    """Turns a failure to write into what to do about it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or workdir} cannot be written ({error.strerror}): mend that, or choose another --workdir"
        ) from error

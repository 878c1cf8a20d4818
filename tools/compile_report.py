"""What a preset asks of chips that need not be here: `python -m tools.compile_report PRESET --topology v5e:16x16`."""

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.presets import from_command_line
from vlm_jax.commandline import command
from vlm_jax.contract import abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, model_of
from vlm_jax.sharding import batch_sharding, make_mesh, placed, replicated
from vlm_jax.train.layout import programs
from vlm_jax.train.step import TrainState
from vlm_jax.trees import count_parameters

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A preset and the chips to compile it for."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    topology: str = "v5e:16x16"
    """TPU chips as libtpu names them, such as v5e:4x4, v5p:4x4x4, v6e:16x16."""


def main() -> None:
    purpose = "Compiles a preset's train step for chips that need not be here, and tells what it asks of them."
    _, options = from_command_line("python -m tools.compile_report", purpose, lambda preset: Options(experiment=preset))
    results = compile_report(options.experiment, chips(options.topology))
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")


def chips(topology: str) -> list[jax.Device]:
    """Devices to compile for and not to run on.

    Raises:
      UserError: libtpu is not installed or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud's machine which chips it has
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # of several kinds
        reason = str(error).splitlines()[0]
        raise UserError(
            f"nothing can be compiled for --topology {topology} ({reason}): pip install -e '.[tpu]', and choose "
            f"one such as v5e:16x16"
        ) from error


def compile_report(experiment: Experiment, devices: list[jax.Device]) -> dict[str, int | str]:
    """Parameters, bytes on one chip, and for each kind of collective how often a step runs it and the bytes it gives.

    Raises:
      UserError: the mesh or the batch do not fit the chips, or the step does not fit their memory.
    """
    training = experiment.training
    mesh = make_mesh(training.mesh, devices)
    state, lowered = lower_step(experiment, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise UserError(
            f"the step does not fit ({reason}): split it more ways, or compute activations again"
        ) from error
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    results: dict[str, int | str] = {
        "chips": f"{mesh.size} {devices[0].device_kind}, mesh {'x'.join(map(str, mesh.devices.shape))}",
        "batch size": training.batch_size,
        "parameters": count_parameters((state.params, state.frozen)),
        "bytes/kept between steps, and batch": kept,
        "bytes/temporary": memory.temp_size_in_bytes,
        "bytes/in all": kept + memory.temp_size_in_bytes,
    }
    times, sizes = collectives(compiled.as_text() or "")
    for kind in times:
        results[f"{kind}/times"], results[f"{kind}/bytes"] = times[kind], sizes[kind]
    return results


def lower_step(experiment: Experiment, mesh: Mesh) -> tuple[TrainState, jax.stages.Lowered]:
    """The train step as training compiles it, without a single array; and the shapes of the state."""
    model = model_of(experiment)
    batch = placed(abstract_batch(model.inputs, experiment.training.batch_size), batch_sharding(mesh))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    # Abstract, for what is computed while tracing would have to run on the mesh's devices.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state, _, step = programs(
            model, experiment.training, mesh, frozen=experiment.frozen, frozen_dtype=experiment.frozen_dtype
        )
        return state, step.lower(state, batch, key)


def collectives(program: str) -> tuple[Counter[str], Counter[str]]:
    """How often each kind runs in an optimised HLO program, loops counted, and the bytes of all its results.

    Those of a reduce-scatter are counted before it is scattered, as those of an all-gather are after it is gathered.
    """
    times: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    pattern = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
    bodies = {found[2]: found[3] for found in pattern.finditer(program)}

    def walk(name: str, repeats: int) -> None:
        for line in bodies.get(name, "").splitlines():
            found = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
            if found is None:
                continue
            kind = found[2].removesuffix("-start")
            if kind in COLLECTIVES:
                kind = "reduce-scatter" if "all-reduce-scatter" in name else kind  # as the TPU's compiler fuses it
                times[kind] += repeats
                sizes[kind] += repeats * result_bytes(found[1])
            elif loop := re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                walk(loop[2], repeats * trip_count(line, bodies[loop[1]]))
            elif called := re.search(r"(?:calls|to_apply)=%?([\w.-]+)", line):
                walk(called[1], repeats)

    (entry,) = (found[2] for found in pattern.finditer(program) if found[1])
    walk(entry, 1)
    return times, sizes


def trip_count(loop: str, condition: str) -> int:
    """Of a loop whose end is a constant, as a scan's is."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', loop) or re.search(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(told[1]) if told else 1


def result_bytes(shape: str) -> int:
    """Of an HLO shape such as `bf16[4,8]{1,0}`; of several, of all."""
    arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shape)
    return sum(int(bits) * math.prod(map(int, filter(None, sizes.split(",")))) // 8 for bits, sizes in arrays)


if __name__ == "__main__":
    with command():
        jax.config.update("jax_platforms", "cpu")
        main()

"""Times a preset: `python -m tools.benchmark PRESET [--steps N] [--against LIBRARY] [--field.subfield VALUE ...]`."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments.presets import from_command_line
from experiments.run import join
from tools.peers import compare
from vlm_jax.commandline import command
from vlm_jax.contract import Input, Model, abstract_batch, check_batch
from vlm_jax.data import make_tokenizer, open_training_data, rows_of, train_batches
from vlm_jax.experiment import Experiment, model_of
from vlm_jax.files import check_writable, write_output
from vlm_jax.paths import local_path
from vlm_jax.sharding import check_batch_size, make_mesh, process_rows, to_global
from vlm_jax.train.flops import count_flops, model_flops
from vlm_jax.train.layout import programs
from vlm_jax.train.step import eval_variables
from vlm_jax.trees import count_parameters

Results = dict[str, float | int | str | None]

STEPS = 20
WARM_UP = 3

# Dense bf16 FLOP/s of one device. TPU: cloud.google.com/tpu/docs, "System architecture", peak compute per chip, and
# JAX's names of each. GPU: NVIDIA's data sheets of the A100, H100, H200 and HGX B200, without sparsity.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A preset and what to do with it."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    pipeline: bool = True
    """Time the input pipeline too, which needs the data."""
    against: Literal["diffusers", "transformers", "open_clip"] | None = None
    """Time the same sizes of this library instead, turn about with ours: see `tools.peers`."""
    json: Path | None = None
    """File to write the results to."""


def main() -> None:
    purpose = "Times the input pipeline and --steps train steps of a preset."
    preset, options = from_command_line(
        "python -m tools.benchmark", purpose, lambda preset: Benchmark(experiment=brief(preset))
    )
    join(options.experiment.distributed)
    out = None if options.json is None else local_path(options.json)
    if out is not None:
        check_writable(out)
    results: Results = {"preset": preset}
    if options.against is None:
        results |= benchmark(options.experiment, pipeline=options.pipeline)
    else:
        results |= compare(options.experiment, options.against, random_batch)
    if jax.process_index() == 0:
        print_table(results)
        if out is not None:
            text = json.dumps(results, indent=2) + "\n"
            write_output(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def brief(experiment: Experiment) -> Experiment:
    """The experiment with few steps and the schedule that it has with all of them."""
    training = experiment.training
    optimizer = replace(training.optimizer, decay_steps=training.optimizer.decay_steps or training.steps)
    return replace(experiment, training=replace(training, steps=STEPS, optimizer=optimizer))


def benchmark(experiment: Experiment, *, pipeline: bool = True) -> Results:
    """Times the input pipeline alone, and the train step alone on random data; as many batches of each as steps.

    Times are in seconds, memory in bytes a device, FLOPs over all devices; None is what the backend does not tell.
    """
    training = experiment.training
    mesh = make_mesh(training.mesh)
    check_batch_size(training.batch_size, mesh, training.micro_steps)
    model = model_of(experiment)
    results: Results = {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "batch_size": training.batch_size,
    }
    rate = pipeline_rate(model, experiment, mesh) if pipeline else None
    with jax.set_mesh(mesh):
        step = time_step(model, experiment, mesh)
    if rate is not None:
        results["pipeline/examples_per_second"] = rate
        results["pipeline/rate_over_step_rate"] = rate / step["step/examples_per_second"]
    return results | step


def pipeline_rate(model: Model, experiment: Experiment, mesh: Mesh) -> float:
    """Examples a second from the data set to checked host arrays, over all processes, while no device computes."""
    data, training, data_dir = experiment.data, experiment.training, local_path(experiment.data_dir)
    sources = open_training_data(data, model.inputs, data_dir)
    tokenizer = make_tokenizer(data, sources)
    batches = train_batches(
        [rows_of(source, data, model.inputs, tokenizer) for source in sources],
        data,
        model.inputs,
        tokenizer,
        batch_size=training.batch_size,
        rows=process_rows(training.batch_size, mesh),
        seed=training.seed,
        start=0,
        stop=WARM_UP + training.steps,
    )
    for _ in range(WARM_UP):
        next(batches)
    since = time.perf_counter()
    for batch in batches:
        check_batch(model.inputs, batch)
    return training.steps * training.batch_size / (time.perf_counter() - since)


def time_step(model: Model, experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
    """Compiles the train step as training does and runs it again and again on one random batch."""
    training, frozen = experiment.training, experiment.frozen
    key = jax.random.key(training.seed)
    rows = process_rows(training.batch_size, mesh)
    batch = to_global(random_batch(model.inputs, len(rows), training.seed), training.batch_size, mesh)
    abstract, init, step = programs(model, training, mesh, frozen=frozen, frozen_dtype=experiment.frozen_dtype)
    state = init(key, batch, {})

    since = time.perf_counter()
    compiled = step.lower(state, batch, key).compile()
    compile_seconds = time.perf_counter() - since
    times = []
    for _ in range(WARM_UP + training.steps):
        since = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - since)
    times = times[WARM_UP:]
    seconds = float(np.median(times))

    inputs = abstract_batch(model.inputs, training.batch_size)
    flops = model_flops(model, eval_variables(abstract), inputs, frozen)
    device = mesh.local_devices[0]
    peak = PEAK_FLOPS.get(device.device_kind)
    compiled_for, in_use = compiled.memory_analysis(), device.memory_stats()
    return {
        "parameters": count_parameters((abstract.params, abstract.frozen)),
        "step/compile_seconds": compile_seconds,
        "step/seconds": seconds,
        "step/seconds_min": min(times),
        "step/seconds_max": max(times),
        "step/examples_per_second": training.batch_size / seconds,
        "step/model_flops": flops,
        "step/hardware_flops": count_flops(step, abstract, inputs, key),
        "step/model_flops_per_second": flops / seconds,
        "step/mfu": None if peak is None else flops / seconds / (mesh.size * peak),
        "memory/parameters": bytes_per_device((state.params, state.frozen)),
        "memory/optimizer": bytes_per_device(state.opt_state),
        "memory/step": None if compiled_for is None else step_bytes(compiled_for),
        "memory/device_peak": None if in_use is None else in_use["peak_bytes_in_use"],
    }


def step_bytes(compiled_for: Any) -> int:
    """Arguments, results and temporaries, what is overwritten in place once; the analysis's own peak omits temporaries
    on the CPU.
    """
    inputs, outputs = compiled_for.argument_size_in_bytes, compiled_for.output_size_in_bytes
    return inputs + outputs - compiled_for.alias_size_in_bytes + compiled_for.temp_size_in_bytes


def random_batch(inputs: Mapping[str, Input], size: int, seed: int) -> dict[str, np.ndarray]:
    """Host arrays that the model accepts: uniform integers, or normal numbers."""
    rng, batch = np.random.default_rng(seed), {}
    for name, spec in inputs.items():
        shape, dtype = (size, *spec.shape), np.dtype(spec.dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            batch[name] = rng.standard_normal(shape, np.float32).astype(dtype)
        else:
            batch[name] = rng.integers(0, spec.limit or 2, shape).astype(dtype)
        if spec.contains is not None:
            batch[name].reshape(size, -1)[:, -1] = spec.contains
        if spec.span is not None:  # one after the other, as many as there is room for
            first = spec.span * np.arange(*spec.shape)
            batch[name][:] = np.where(first + spec.span < (spec.limit or 0), first, (spec.limit or 0) - 1)
    return batch


def bytes_per_device(tree: Any) -> int:
    """What one device holds of a tree of arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def print_table(results: Results) -> None:
    """One result a line."""
    width = max(map(len, results))
    for name, value in results.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {'unknown' if text is None else text}")


if __name__ == "__main__":
    with command():
        jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
        main()

"""Batch statistics over many devices: of all devices, of groups, or of each alone.

Trains a small residual network on scikit-learn's handwritten digits, with few images on
each device, and compares three ways to synchronize the statistics of batch norm:

    python examples/train_multi_device.py

On a machine without accelerators, this simulates eight devices on the CPU.

Options:
    --devices N       Number of devices to use, by default all. Without accelerators,
                      the number to simulate (default 8).
    --sync MODE       global: statistics of the whole batch; group:K: of K devices;
                      none: of each device. Repeat it to compare modes. The default is
                      all three, with groups of two.
    --style STYLE     jit, shard_map or pmap (default shard_map).
    --api API         linen or nnx (default linen).
    --batch N         Images per step, on all devices together (default 16).
    --steps N         Training steps (default 200).
    --seed N          Seed of parameters and batches (default 0).
    --out DIR         Folder for checkpoints (default out/multi_device).
    --resume          Continue from the checkpoints, on any number of devices. (They
                      hold one set of statistics. If each device or group has its own,
                      this is all of them pooled.)

On several machines, run the same command in every process and add --distributed, which
calls `jax.distributed.initialize()`. Under SLURM, Open MPI, Kubernetes and on Cloud
TPU, JAX finds the other processes by itself:

    srun --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 \\
        python examples/train_multi_device.py --distributed --out /shared/run

Otherwise, name the processes yourself. For example, two processes on one machine:

    for i in 0 1; do
        python examples/train_multi_device.py --distributed --devices 8 \\
            --coordinator localhost:9876 --processes 2 --process $i &
    done; wait

(--devices is then the number of devices of all processes together.) All processes must
have access to the folder of the checkpoints. pmap works in one process only.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import re
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from _multi_device_networks import network
from _multi_device_training import (
    AXIS,
    Data,
    State,
    Sync,
    collected,
    data_mesh,
    evaluate,
    load_data,
    new_state,
    placed,
    train_step,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import trange


def sync_mode(text: str) -> Sync:
    if not re.fullmatch(r"global|none|group:[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not global, none or group:K")
    return Sync(text)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a small residual network on handwritten digits, on many "
        "devices, and compares ways to synchronize batch norm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", type=int, help="number to use, or to simulate")
    add("--sync", type=sync_mode, action="append", help="global, group:K or none")
    add("--style", choices=["jit", "shard_map", "pmap"], default="shard_map")
    add("--api", choices=["linen", "nnx"], default="linen")
    add("--batch", type=int, default=16, help="images per step, on all devices")
    add("--steps", type=int, default=200, help="training steps")
    add("--seed", type=int, default=0, help="seed of parameters and batches")
    add("--out", type=Path, default=Path("out/multi_device"), help="for checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoints")
    add("--distributed", action="store_true", help="call jax.distributed.initialize()")
    add("--coordinator", metavar="HOST:PORT", help="address of the first process")
    add("--processes", type=int, help="number of processes")
    add("--process", type=int, help="number of this process, from 0")
    return parser


def start_devices(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Simulates devices if there are no accelerators, and joins other processes."""
    processes = args.processes or 1
    jax.config.update("jax_num_cpu_devices", (args.devices or 8) // processes)
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    args.devices = args.devices or jax.device_count()
    if args.devices > jax.device_count():
        parser.error(f"--devices {args.devices}: there are {jax.device_count()}")
    args.sync = args.sync or [sync_mode(s) for s in ("global", "group:2", "none")]
    for sync in args.sync:
        if args.devices % sync.group(args.devices):
            parser.error(f"--sync {sync.name} does not divide {args.devices} devices")
    if args.batch % args.devices:
        parser.error(f"--batch {args.batch} does not divide into {args.devices} parts")
    if args.style == "pmap" and jax.process_count() > 1:
        parser.error("--style pmap is for one process: use shard_map or jit")


def train(args: argparse.Namespace, sync: Sync, data: Data, mesh: Mesh) -> State:
    """Trains in one mode, from the start or the last checkpoint."""
    folder = args.out.absolute() / f"{args.api}-{sync.name.replace(':', '')}"
    with ocp.StandardCheckpointer() as checkpointer:
        first, state = 0, new_state(args.api, args.seed)
        if args.resume:
            first, state = restore(checkpointer, folder, state, mesh)
        if first > args.steps:
            raise SystemExit(f"the checkpoint is at step {first}, past --steps")
        state = placed(state, sync, mesh)
        step = train_step(args.style, sync, args.api, mesh)
        bar = trange(
            first,
            args.steps,
            desc=sync.name,
            unit="step",
            disable=jax.process_index() > 0,
        )
        for i in bar:
            state = step(state, *batch(data, mesh, args.seed, i, args.batch))
        state = collected(state, sync, mesh)
        saved = {"step": args.steps, "state": state._asdict()}
        checkpointer.save(folder, saved, force=True)
    return state


def restore(checkpointer, folder: Path, like: State, mesh: Mesh) -> tuple[int, State]:
    """The step and state of a checkpoint, which may come from other devices."""
    if not folder.exists():
        raise SystemExit(f"no checkpoint in {folder}: start without --resume")
    replicated = NamedSharding(mesh, P())
    wanted = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
        like._asdict(),
    )
    saved = checkpointer.restore(folder, {"step": 0, "state": wanted})
    return saved["step"], State(**saved["state"])


def batch(data: Data, mesh: Mesh, seed: int, step: int, size: int):
    """The images of a step, each on its device. They depend on seed and step only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows = jax.random.choice(key, len(data.train_x), (size,), replace=False)
    rows = jax.device_get(rows)
    spread = NamedSharding(mesh, P(AXIS))
    return jax.device_put((data.train_x[rows], data.train_y[rows]), spread)


def table(args: argparse.Namespace, states: dict[str, State], data: Data, mesh: Mesh):
    """A line for each mode."""
    net = network(args.api)
    everywhere = NamedSharding(mesh, P())
    halves = [(data.train_x, data.train_y), (data.test_x, data.test_y)]
    lines = [
        f"{'statistics of':>14} {'images':>7} {'train loss':>11} {'test loss':>10} "
        f"{'test accuracy':>14}"
    ]
    for sync in args.sync:
        found = [
            evaluate(net, states[sync.name], *jax.device_put(half, everywhere))
            for half in halves
        ]
        train_loss, test_loss = (half["loss"].item() for half in found)
        devices = sync.group(args.devices)
        name = {"global": "the batch", "none": "each device"}.get(
            sync.name, f"{devices} devices"
        )
        lines.append(
            f"{name:>14} {args.batch * devices // args.devices:>7} {train_loss:>11.4f} "
            f"{test_loss:>10.4f} {found[1]['accuracy'].item():>14.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    start_devices(args, parser)
    mesh, data = data_mesh(args.devices), load_data()
    states = {sync.name: train(args, sync, data, mesh) for sync in args.sync}
    lines = table(args, states, data, mesh)
    if jax.process_index() == 0:
        kind = jax.devices()[0].device_kind
        print(f"\n{args.devices} devices ({kind}), {args.api}, {args.style}, ", end="")
        print(f"{args.steps} steps of {args.batch} images\n\n{lines}")


if __name__ == "__main__":
    main()

"""One of several processes that train together, or one by itself.

python worker.py --processes 2 --process 0 --port 12345 --devices 4 --out result.npz
"""

import argparse
import pathlib
import time

import jax
import numpy as np


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--devices", type=int, default=1, help="of this process")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoints", type=pathlib.Path)
    parser.add_argument("--hang-at", type=int, help="the step to wait at to be killed")
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_enable_x64", True)
    if args.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.process,
            initialization_timeout=30,
            heartbeat_timeout_seconds=10,
        )
    assert jax.device_count() == args.processes * args.devices
    state = train(args)

    import jaxbn

    jaxbn.assert_replicated(state)
    refuses_what_differs(jaxbn.assert_replicated)
    if args.process == 0:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(args.out, **arrays)


def train(args, steps=20):
    """Twenty steps on the digits, from the last checkpoint if there is one."""
    import orbax.checkpoint as ocp
    from sklearn.datasets import load_digits

    x, label = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spread = lambda a: jax.make_array_from_callback(
        a.shape, jax.NamedSharding(mesh, jax.P("data")), lambda index: a[index]
    )
    step, state = network(mesh)
    first, manager = 0, None
    if args.checkpoints:
        manager = ocp.CheckpointManager(args.checkpoints)
        if manager.latest_step() is not None:
            first = manager.latest_step()
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
            print("resumed at", first, flush=True)
    for i in range(first, steps):
        if i == args.hang_at:
            print("hanging", flush=True)
            time.sleep(600)
        rows = order[64 * i : 64 * (i + 1)]
        # The last rows of each batch are no data: on 8 devices the last one's.
        present = np.arange(64) < 56
        batch = x[rows] / 16, label[rows], present[:, None]
        state = step(state, *map(spread, batch))
        if manager and (i + 1) % 5 == 0:
            manager.save(i + 1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
    if manager:
        manager.close()
    batches = (spread(x[rows] / 16) for rows in np.split(order[: 64 * 5], 5))
    return {**state, "population": population(state, batches)}


def population(state, batches):
    """The statistics of the first layer over several batches, whatever holds them."""
    import jaxbn

    measure = jax.jit(lambda params, x: {"hidden": jaxbn.moments(x @ params["hidden"])})
    return jaxbn.population.recalibrate(
        lambda batch: measure(state["params"], batch), batches
    )


def network(mesh):
    """A step of training by SGD, and the state that it starts from."""
    import jax.numpy as jnp

    import jaxbn

    bn = jaxbn.layers.standard(
        axis_name="data", momentum=0.9, param_dtype=float, stats_dtype=float
    )
    norm, stats = bn.init(32)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
        "norm": norm,
        "out": jax.random.normal(keys[1], (32, 10)) / 6,
    }

    def loss(params, stats, x, label, present):
        h = x @ params["hidden"]
        h, stats = bn.apply(params["norm"], stats, h, training=True, weights=present)
        logits = jax.nn.relu(h) @ params["out"]
        each = -jax.nn.log_softmax(logits)[jnp.arange(len(x)), label]
        return jnp.sum(each * present[:, 0]) / 56, stats

    def step(state, x, label, present):
        grads, stats = jax.grad(loss, has_aux=True)(
            state["params"], state["stats"], x, label, present
        )
        params = jax.tree.map(lambda p, g: p - 0.5 * g, state["params"], grads)
        return {"params": params, "stats": stats}

    rows, all_ = jax.P("data"), jax.P()
    replicated = jax.NamedSharding(mesh, all_)
    state = jax.device_put({"params": params, "stats": stats}, replicated)
    spread = jax.shard_map(
        step, mesh=mesh, in_specs=(all_, rows, rows, rows), out_specs=all_
    )
    return jax.jit(spread), state


def refuses_what_differs(assert_replicated):
    """The last device has another value, maybe that of another process."""
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    last = max(d.id for d in jax.devices())
    different = jax.make_array_from_single_device_arrays(
        (),
        jax.NamedSharding(mesh, jax.P()),
        [jax.device_put(float(d.id == last), d) for d in jax.local_devices()],
    )
    message = ""
    try:
        assert_replicated({"a": different})
    except AssertionError as error:
        message = str(error)
    if jax.device_count() > 1:
        assert f"devices [{last}] differ from 0" in message, message


if __name__ == "__main__":
    main()

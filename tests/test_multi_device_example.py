"""The multi-device example: its styles agree, and its checkpoints fit any devices."""

import functools
import pathlib
import sys

import jax
import pytest
from data import assert_close

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The example in this process, with a network of one narrow block."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _multi_device_networks
    import train_multi_device as example

    monkeypatch.setattr(_multi_device_networks, "WIDTHS", (4,))
    monkeypatch.setattr(example, "new_state", functools.cache(example.new_state))
    data = example.load_data()
    data = data._replace(train_x=data.train_x[:400], train_y=data.train_y[:400])

    def run(*argv, table=False):
        args = example.argument_parser().parse_args(
            ["--out", str(tmp_path), *map(str, argv)]
        )
        (sync,) = args.sync
        mesh = example.data_mesh(args.devices)
        with jax.numpy_rank_promotion("allow"):
            state = example.train(args, sync, data, mesh)
            if table:
                table = example.table(args, {sync.name: state}, data, mesh)
        return jax.device_get(state), table

    return run


def close(a, b):
    jax.tree.map(lambda x, y: assert_close(x, y, 2e-3, 2e-4), a, b)


@pytest.mark.parametrize(
    ("api", "sync"),
    [
        ("linen", "global"),
        pytest.param("nnx", "group:2", marks=pytest.mark.slow),
        pytest.param("linen", "group:2", marks=pytest.mark.slow),
        pytest.param("linen", "none", marks=pytest.mark.slow),
    ],
)
def test_the_styles_agree(run, api, sync):
    options = [
        "--devices",
        8,
        "--batch",
        32,
        "--steps",
        2,
        "--api",
        api,
        "--sync",
        sync,
    ]
    states = [run(*options, "--style", s)[0] for s in ("shard_map", "jit", "pmap")]
    close(states[0], states[1])
    close(states[0], states[2])


@pytest.mark.slow
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_checkpoint_of_eight_devices_goes_on_with_one_and_with_two(run, api):
    options = ["--sync", "global", "--api", api]
    at_once, _ = run(*options, "--devices", 8, "--steps", 4)
    saved, table = run(*options, "--devices", 8, "--steps", 2, table=True)
    for devices in (1, 2):
        restored = [*options, "--devices", devices, "--resume", "--style", "jit"]
        state, same = run(*restored, "--steps", 2, table=True)
        jax.tree.map(lambda a, b: assert_close(a, b, 0, 0), state, saved)
        assert same == table
    resumed, _ = run(*restored, "--steps", 4)
    close(resumed, at_once)


def test_wrong_options(run, monkeypatch, capsys, tmp_path):
    import train_multi_device as example

    # The devices of this process cannot be made anew.
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for argv, message in [
        (["--devices", 9], "there are 8"),
        (["--sync", "group:3"], "does not divide 8"),
        (["--sync", "half"], "not global, none or group:K"),
        (["--batch", 12], "12 does not divide into 8"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train_multi_device.py", *map(str, argv)])
        with pytest.raises(SystemExit):
            example.main()
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="start without --resume"):
        run("--sync", "none", "--devices", 1, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["jit", "shard_map", "pmap"])
@pytest.mark.parametrize(
    ("sync", "devices"), [("none", 1), ("global", 1), ("group:2", 2), ("group:1", 2)]
)
def test_the_smallest_groups_and_the_largest(run, style, sync, devices):
    run("--sync", sync, "--devices", devices, "--steps", 1, "--style", style)

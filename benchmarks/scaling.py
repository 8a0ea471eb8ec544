"""What synchronized batch norm costs ResNet-50, by a model of latency and bandwidth.

Prints the table of docs/scaling.md:

    python benchmarks/scaling.py

Nothing is measured here: these are published figures of the links (their sources stand
beside them), the numbers of floats that `tests/test_collectives.py` finds in compiled
programs, and arithmetic.
"""

import math

# Channels of the 53 batch norms: the stem, then per stage its blocks and a shortcut.
STAGES = [(3, 64), (4, 128), (6, 256), (3, 512)]
CHANNELS = [64] + [c for n, w in STAGES for c in [w, w, 4 * w] * n + [4 * w]]
# Forward and backward of an image of 224 pixels: 3 · 4.1 G multiply-adds.
FLOP_PER_IMAGE = 3 * 2 * 4.1e9
# Peak in bfloat16 without sparsity, of which a convolutional network may get a third:
# https://www.nvidia.com/en-us/data-center/h200/, https://cloud.google.com/tpu/docs/v5e,
# https://cloud.google.com/tpu/docs/v5p
GPU, V5E, V5P = 989e12, 197e12, 459e12
USED = 1 / 3
BATCHES = (32, 128, 256)


def all_reduce_gpu(devices: int, size: float, per_node: int = 8) -> float:
    """Seconds by NCCL's own model of its tree with the low-latency protocol.

    https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc: 6.8 µs, and twice
    0.6 µs for each GPU of a node and 5 µs for each doubling of the nodes. The bytes go
    up and down the tree, at 50 GB/s between nodes (InfiniBand NDR, 400 Gb/s) and at 450
    GB/s within (NVLink 4, one way, https://www.nvidia.com/en-us/data-center/h200/).
    """
    local = min(devices, per_node)
    nodes = devices // local
    latency = 6.8e-6 + 2 * ((local - 1) * 0.6e-6 + math.log2(nodes) * 5.0e-6)
    return latency + 2 * size / (450e9 if nodes == 1 else 50e9)


def all_reduce_tpu(torus: tuple[int, ...], size: float) -> float:
    """Seconds on a torus of chips: 1 µs a hop, half around each axis, twice.

    https://jax-ml.github.io/scaling-book/sharding: an all-reduce is a reduce-scatter
    and an all-gather, each max(hops · 1 µs, bytes / (bandwidth · axes)), with 9e10 B/s
    for an axis of TPU v5e, both ways.
    """
    hops = sum(torus) / 2
    return 2 * max(hops * 1e-6, size / (9e10 * len(torus)))


def network(all_reduce) -> tuple[float, float]:
    """Seconds of all forward and all backward collectives of a step."""
    forward = sum(all_reduce(4 * (2 * c + 1)) for c in CHANNELS)
    backward = sum(all_reduce(4 * 2 * c) for c in CHANNELS)
    return forward, backward


def main() -> None:
    """Prints both tables."""
    floats = sum(2 * c + 1 + 2 * c for c in CHANNELS)
    print(
        f"ResNet-50: {len(CHANNELS)} layers, {sum(CHANNELS)} channels, largest ", end=""
    )
    print(f"{max(CHANNELS)}; {floats} floats a step, {4 * floats / 1e3:.0f} kB")
    print(f"arithmetic: {FLOP_PER_IMAGE / 1e9:.1f} GFLOP an image\n")
    cases = [
        ("8 H200, one node", lambda s: all_reduce_gpu(8, s), GPU),
        ("256 H200, 32 nodes", lambda s: all_reduce_gpu(256, s), GPU),
        ("4096 H200, 512 nodes", lambda s: all_reduce_gpu(4096, s), GPU),
        ("8 v5e, 2 × 4", lambda s: all_reduce_tpu((2, 4), s), V5E),
        ("256 v5e, 16 × 16", lambda s: all_reduce_tpu((16, 16), s), V5E),
        ("4096 v5p, 16 × 16 × 16", lambda s: all_reduce_tpu((16,) * 3, s), V5P),
    ]
    print_row("", "layer of 64", "of 2048", "forward", "backward", "step")
    print("|---" * 6 + "|")
    for name, all_reduce, _ in cases:
        seconds = network(all_reduce)
        layers = [2 * all_reduce(4 * 2 * c) * 1e6 for c in (64, 2048)]
        steps = [f"{s * 1e3:.1f} ms" for s in (*seconds, sum(seconds))]
        print_row(name, *(f"{us:.0f} µs" for us in layers), *steps)
    print("\nCollectives, relative to the arithmetic of a step:\n")
    print_row("images per device", *BATCHES)
    print("|---" * (1 + len(BATCHES)) + "|")
    for name, all_reduce, peak in cases:
        work = [b * FLOP_PER_IMAGE / (USED * peak) for b in BATCHES]
        collectives = sum(network(all_reduce))
        print_row(name, *(f"{collectives / w:.0%}" for w in work))


def print_row(*cells) -> None:
    """A line of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()

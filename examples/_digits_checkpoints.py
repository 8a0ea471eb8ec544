"""Checkpoints of the digits demo: both networks, and their evaluations so far."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from _digits_training import Run

SAVE_EVERY = 100


class ResumeError(Exception):
    """There is no checkpoint that this run could continue."""


class Checkpoints:
    """The latest checkpoint, in the folder `checkpoints` of the output directory.

    It holds parameters, statistics and the optimizer's state as arrays, and the
    history, the seed and the learning rate as JSON.
    """

    def __init__(self, out: Path, seed: int, lr: float):
        self.out = out
        self.settings = {"seed": seed, "lr": lr}
        self.manager = ocp.CheckpointManager(
            out.absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=1),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.manager.close()

    def clear(self) -> None:
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def step(self, steps: int) -> int:
        """The checkpoint's step, if a run to `steps` can continue it."""
        step = self.manager.latest_step()
        if step is None:
            raise ResumeError(f"no checkpoint in {self.out}: start without --resume")
        saved, wanted = self._notes(step)["settings"], self.settings
        if saved != wanted:
            raise ResumeError(
                f"the checkpoint in {self.out} is of --seed {saved['seed']} --lr "
                f"{saved['lr']}, not of --seed {wanted['seed']} --lr {wanted['lr']}: "
                "use those, or start again without --resume"
            )
        if step > steps:
            raise ResumeError(
                f"the checkpoint in {self.out} is at step {step}, past --steps {steps}:"
                f" use --steps {step} or more, or start again without --resume"
            )
        return step

    def save(self, step: int, runs: dict[str, Run]) -> None:
        notes = {
            "settings": self.settings,
            "history": {name: run.history for name, run in runs.items()},
            "seconds": {name: run.seconds for name, run in runs.items()},
        }
        states = {name: run.state for name, run in runs.items()}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                states=ocp.args.StandardSave(states), notes=ocp.args.JsonSave(notes)
            ),
        )

    def restore(self, step: int, runs: dict[str, Run]) -> None:
        # As NumPy arrays. JAX arrays would be bound to a device, and compile again.
        target = jax.device_get({name: run.state for name, run in runs.items()})
        args = ocp.args.Composite(states=ocp.args.StandardRestore(target))
        states = self.manager.restore(step, args=args)["states"]
        notes = self._notes(step)
        for name, run in runs.items():
            run.state = states[name]
            run.history = notes["history"][name]
            run.seconds = notes["seconds"][name]

    def _notes(self, step: int) -> dict:
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args)["notes"]

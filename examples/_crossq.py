"""The pendulum and the agents of `crossq.py`: SAC, and CrossQ, which changes it.

Everything is a pure function of arrays, so training is a `scan` and several seeds are a
`vmap`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxbn

EPISODE = 200  # steps
GAMMA, TAU, BATCH, WARM_UP = 0.99, 0.005, 128, 200


class Kind(NamedTuple):
    """A kind of agent: the norm of its critics, and whether it has target networks."""

    norm: str | None
    targets: bool


KINDS = {
    "CrossQ (batch renorm)": Kind("renorm", targets=False),
    "the same with batch norm": Kind("batch", targets=False),
    "the same without a norm": Kind(None, targets=False),
    "SAC, target networks": Kind(None, targets=True),
}


class Pendulum(NamedTuple):
    """Angle (0 is upright) and speed of a rod that a weak motor must hold upright."""

    angle: jax.Array
    speed: jax.Array

    @classmethod
    def drawn(cls, key: jax.Array) -> "Pendulum":
        low, high = jnp.array([-jnp.pi, -1.0]), jnp.array([jnp.pi, 1.0])
        return cls(*jax.random.uniform(key, (2,), minval=low, maxval=high))

    def seen(self) -> jax.Array:
        return jnp.stack([jnp.cos(self.angle), jnp.sin(self.angle), self.speed])

    def pushed(self, action: jax.Array) -> tuple["Pendulum", jax.Array]:
        """The next state, and the reward; `action` is from −1 to 1."""
        torque = 2 * action[0]
        off = (self.angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = off**2 + 0.1 * self.speed**2 + 0.001 * torque**2
        speed = self.speed + 0.05 * (15 * jnp.sin(self.angle) + 3 * torque)
        speed = jnp.clip(speed, -8, 8)
        return Pendulum(self.angle + 0.05 * speed, speed), -cost


class Actor(nn.Module):
    width: int

    @nn.compact
    def __call__(self, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation of an action, before tanh."""
        for _ in range(2):
            seen = nn.relu(nn.Dense(self.width)(seen))
        mean, log_std = jnp.split(nn.Dense(2)(seen), 2, -1)
        return mean, jnp.clip(log_std, -10, 2)


class Critic(nn.Module):
    width: int
    norm: str | None

    @nn.compact
    def __call__(self, seen: jax.Array, action: jax.Array, train: bool) -> jax.Array:
        h = self.normalized(jnp.concatenate([seen, action], -1), train)
        for _ in range(2):
            h = self.normalized(nn.relu(nn.Dense(self.width)(h)), train)
        return nn.Dense(1)(h)[..., 0]

    def normalized(self, h: jax.Array, train: bool) -> jax.Array:
        common: Any = {"use_running_average": not train, "epsilon": 1e-3}
        if self.norm == "renorm":
            options = {"tracks": "var", "warm_up_steps": WARM_UP}
            return jaxbn.linen.BatchRenorm(**common, **options)(h)
        return jaxbn.linen.BatchNorm(**common)(h) if self.norm else h


class Critics(nn.Module):
    """Two critics, whose smaller value counts."""

    width: int
    norm: str | None

    @nn.compact
    def __call__(self, seen: jax.Array, action: jax.Array, train: bool) -> jax.Array:
        two = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=None,  # type: ignore  (Flax takes None.)
            axis_size=2,
        )
        return two(self.width, self.norm)(seen, action, train)


class Agent(NamedTuple):
    """Everything that training changes."""

    actor: Any
    critics: Any  # params and batch_stats
    targets: Any  # the same for the target networks, if there are any
    log_alpha: jax.Array
    optimizers: Any
    pendulum: Pendulum
    buffer: tuple  # seen, action, reward, seen next
    steps: jax.Array


class Learner(NamedTuple):
    """A kind of agent, with its width and the size of its replay buffer."""

    kind: Kind
    width: int
    capacity: int

    @property
    def actor(self) -> Any:
        return Actor(self.width)

    @property
    def critics(self) -> Any:
        return Critics(2 * self.width, self.kind.norm)

    @property
    def adam(self) -> Any:
        return optax.adam(1e-3, b1=0.9 if self.kind.targets else 0.5)

    def init(self, key: jax.Array) -> Agent:
        keys = jax.random.split(key, 3)
        seen, action = jnp.zeros((2, 3)), jnp.zeros((2, 1))
        actor = self.actor.init(keys[0], seen)
        critics = dict(self.critics.init(keys[1], seen, action, True))
        critics.setdefault("batch_stats", {})
        log_alpha = jnp.zeros(())
        each = actor, critics["params"], log_alpha
        shapes = (3,), (1,), (), (3,)
        buffer = tuple(jnp.zeros((self.capacity, *shape)) for shape in shapes)
        return Agent(
            actor,
            critics,
            critics,
            log_alpha,
            tuple(map(self.adam.init, each)),
            Pendulum.drawn(keys[2]),
            buffer,
            jnp.zeros((), jnp.int32),
        )

    def act(self, actor: Any, seen: jax.Array, key: jax.Array):
        """An action, and the logarithm of its probability."""
        mean, log_std = self.actor.apply(actor, seen)
        noise = jax.random.normal(key, mean.shape)
        before = mean + jnp.exp(log_std) * noise
        log_p = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
        log_p -= 2 * (jnp.log(2.0) - before - nn.softplus(-2 * before))
        return jnp.tanh(before), log_p.sum(-1)

    def critic_loss(self, params, stats, agent: Agent, batch, key):
        """The squared error of both critics, and their new statistics."""
        seen, action, reward, after = batch
        action_after, log_p = self.act(agent.actor, after, key)
        variables = {"params": params, "batch_stats": stats}
        if self.kind.targets:
            q, new = self._q(variables, seen, action)
            q_after = self.critics.apply(agent.targets, after, action_after, False)
        else:  # CrossQ: both are one batch, normalized by the same statistics.
            both = (
                jnp.concatenate([seen, after]),
                jnp.concatenate([action, action_after]),
            )
            q, new = self._q(variables, *both)
            q, q_after = jnp.split(q, 2, 1)
        value = q_after.min(0) - jnp.exp(agent.log_alpha) * log_p
        target = jax.lax.stop_gradient(reward + GAMMA * value)
        return jnp.mean((q - target) ** 2), new

    def _q(self, variables, seen, action):
        q, new = self.critics.apply(
            variables, seen, action, True, mutable=["batch_stats"]
        )
        return q, new.get("batch_stats", {})

    def actor_loss(self, actor, agent: Agent, seen, key):
        """The loss of the actor, and the entropy of its actions (mean −log p)."""
        action, log_p = self.act(actor, seen, key)
        q = self.critics.apply(agent.critics, seen, action, False).min(0)
        return jnp.mean(jnp.exp(agent.log_alpha) * log_p - q), -log_p.mean()

    def update(self, agent: Agent, key: jax.Array) -> Agent:
        """A gradient step of the critics, the actor and the temperature."""
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (BATCH,), 0, jnp.maximum(agent.steps, 1))
        batch = tuple(part[rows] for part in agent.buffer)

        def moved(which, grads, params):
            updates, state = self.adam.update(grads, agent.optimizers[which], params)
            return optax.apply_updates(params, updates), state

        params, stats = agent.critics["params"], agent.critics["batch_stats"]
        grads, stats = jax.grad(self.critic_loss, has_aux=True)(
            params, stats, agent, batch, keys[1]
        )
        params, critic_state = moved(1, grads, params)
        critics = {"params": params, "batch_stats": stats}
        agent = agent._replace(critics=critics)
        if self.kind.targets:
            average = jaxbn.interop.optax.incremental_update
            agent = agent._replace(targets=average(critics, agent.targets, TAU))
        grads, entropy = jax.grad(self.actor_loss, has_aux=True)(
            agent.actor, agent, batch[0], keys[2]
        )
        actor, actor_state = moved(0, grads, agent.actor)
        surplus = entropy + 1  # The target entropy is −1, for one action.
        log_alpha, alpha_state = moved(2, surplus, agent.log_alpha)
        optimizers = actor_state, critic_state, alpha_state
        return agent._replace(actor=actor, log_alpha=log_alpha, optimizers=optimizers)

    def step(self, agent: Agent, key: jax.Array) -> Agent:
        """A step of the pendulum, then a gradient step."""
        keys = jax.random.split(key, 4)
        seen = agent.pendulum.seen()
        action, _ = self.act(agent.actor, seen, keys[0])
        action = jnp.where(
            agent.steps < BATCH, jax.random.uniform(keys[1], (1,), minval=-1), action
        )
        pendulum, reward = agent.pendulum.pushed(action)
        row = agent.steps % self.capacity
        values = seen, action, reward, pendulum.seen()
        buffer = tuple(
            part.at[row].set(value)
            for part, value in zip(agent.buffer, values, strict=True)
        )
        over = (agent.steps + 1) % EPISODE == 0
        drawn = Pendulum.drawn(keys[2])
        pendulum = jax.tree.map(lambda a, b: jnp.where(over, a, b), drawn, pendulum)
        agent = agent._replace(pendulum=pendulum, buffer=buffer, steps=agent.steps + 1)
        return self.update(agent, keys[3])

    def evaluate(self, agent: Agent, key: jax.Array, episodes: int = 8) -> jax.Array:
        """The mean return of the actor, acting without noise."""

        def push(pendulum, _):
            mean, _ = self.actor.apply(agent.actor, pendulum.seen())
            return pendulum.pushed(jnp.tanh(mean))

        def run(key):
            return jax.lax.scan(push, Pendulum.drawn(key), length=EPISODE)[1].sum()

        return jax.vmap(run)(jax.random.split(key, episodes)).mean()

    def part(self, agent: Agent, key: jax.Array, steps: int):
        """Several steps of training, then an evaluation."""
        key, last = jax.random.split(key)
        agent, _ = jax.lax.scan(
            lambda a, k: (self.step(a, k), None), agent, jax.random.split(key, steps)
        )
        return agent, self.evaluate(agent, last)

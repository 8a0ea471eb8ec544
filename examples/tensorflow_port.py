"""A fully connected layer with batch norm, ported from TensorFlow line by line.

Each comment is a line of the original TensorFlow code, and the code below it is its
port. `tf.nn.moments` becomes `tf_nn.moments`, and variables become arrays. The script
prints the moments of the output, which are close to 0 and 1, and the difference between
two ways to compute it.

Run it with

    python examples/tensorflow_port.py
"""

import jax
import jax.numpy as jnp

from jaxbn.interop import tf_nn


def main() -> None:
    key_u, key_w = jax.random.split(jax.random.key(0))
    u = jax.random.normal(key_u, (60, 784))  # a batch of 60 images
    w = 0.1 * jax.random.normal(key_w, (784, 100))
    b = jnp.zeros(100)

    # z = tf.matmul(u, w) + b
    z = jnp.matmul(u, w) + b

    # batch_mean, batch_var = tf.nn.moments(z, [0])
    batch_mean, batch_var = tf_nn.moments(z, [0])

    # scale = tf.Variable(tf.ones([100]));  beta = tf.Variable(tf.zeros([100]))
    scale, beta = jnp.ones([100]), jnp.zeros([100])
    epsilon = 0.001

    # z_hat = (z - batch_mean) / tf.sqrt(batch_var + epsilon)
    # y = scale * z_hat + beta
    z_hat = (z - batch_mean) / jnp.sqrt(batch_var + epsilon)
    two_steps = scale * z_hat + beta

    # y = tf.nn.batch_normalization(z, batch_mean, batch_var, beta, scale, epsilon)
    y = tf_nn.batch_normalization(z, batch_mean, batch_var, beta, scale, epsilon)

    print(
        f"mean of y       {float(jnp.max(jnp.abs(y.mean(0)))):.1e}  (at most, of 100)"
    )
    print(f"variance of y   {float(y.var(0).min()):.4f} to {float(y.var(0).max()):.4f}")
    print(f"two steps − y   {float(jnp.max(jnp.abs(two_steps - y))):.1e}  (at most)")


if __name__ == "__main__":
    main()

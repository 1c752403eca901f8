"""SAM on JAX: two stateless calls, and a separate list of perturbed weights."""

import jax
import jax.numpy as jnp


def train_step(model, rho, state, data):
    """One step of SAM, as a pure function of the state."""
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    x, y = data

    def loss_and_updates(weights):
        y_pred, updated = model.stateless_call(weights, non_trainable, x, training=True)
        return model.compute_loss(x, y, y_pred), (y_pred, updated)

    value_and_grad = jax.value_and_grad(loss_and_updates, has_aux=True)

    # First pass.
    (loss, (y_pred, updated)), gradients = value_and_grad(trainable)

    # Climb to w + e(w), and the second pass there.
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))
    scale = rho / (norm + 1e-12)
    perturbed = [w + scale * gradient for w, gradient in zip(trainable, gradients)]
    _, gradients = value_and_grad(perturbed)

    # Step from w with the gradient at w + e(w).
    trainable, optimizer_variables = model.optimizer.stateless_apply(
        optimizer_variables, gradients, trainable
    )

    logs, new_metrics_variables = {}, []
    for metric in model.metrics:
        start = len(new_metrics_variables)
        values = metrics_variables[start : start + len(metric.variables)]
        given = (loss,) if metric.name == "loss" else (y, y_pred)
        values = metric.stateless_update_state(values, *given)
        logs[metric.name] = metric.stateless_result(values)
        new_metrics_variables += values
    return logs, (trainable, updated, optimizer_variables, new_metrics_variables)

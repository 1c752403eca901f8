"""SAM on TensorFlow: two tapes, and variables that are perturbed and restored."""

import tensorflow as tf


def train_step(model, rho, data):
    """One step of SAM, with the variables perturbed by assignments."""
    x, y = data
    variables = model.trainable_variables

    # First pass.
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred)
    gradients = tape.gradient(loss, variables)

    # Climb to w + e(w).
    scale = rho / (tf.linalg.global_norm(gradients) + 1e-12)
    ascents = [tf.convert_to_tensor(gradient) * scale for gradient in gradients]
    for variable, ascent in zip(variables, ascents):
        variable.assign_add(ascent)

    # Second pass.
    with tf.GradientTape() as tape:
        perturbed = model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
    gradients = tape.gradient(perturbed, variables)

    # Back to w, and step with the gradient at w + e(w).
    for variable, ascent in zip(variables, ascents):
        variable.assign_sub(ascent)
    model.optimizer.apply_gradients(zip(gradients, variables))

    model.metrics[0].update_state(loss)
    return model.compute_metrics(x, y, y_pred)

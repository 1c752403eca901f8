"""SAM on PyTorch: the weights are perturbed in place and restored."""

import torch


def train_step(model, rho, data):
    """One step of SAM, with the weights perturbed in place."""
    x, y = data
    variables = model.trainable_variables
    weights = [variable.value for variable in variables]

    # First pass.
    model.zero_grad()
    y_pred = model(x, training=True)
    loss = model.compute_loss(x=x, y=y, y_pred=y_pred)
    loss.backward()

    # Climb to w + e(w).
    with torch.no_grad():
        norm = torch.norm(torch.stack([w.grad.norm(p=2) for w in weights]), p=2)
        scale = rho / (norm + 1e-12)
        ascents = [w.grad * scale for w in weights]
        for weight, ascent in zip(weights, ascents):
            weight.add_(ascent)

    # Second pass.
    model.zero_grad()
    model.compute_loss(x=x, y=y, y_pred=model(x, training=True)).backward()

    # Back to w, and step with the gradient at w + e(w).
    with torch.no_grad():
        for weight, ascent in zip(weights, ascents):
            weight.sub_(ascent)
        model.optimizer.apply([w.grad for w in weights], variables)

    model.metrics[0].update_state(loss)
    return model.compute_metrics(x, y, y_pred)

"""PyTorch modules: a step is not visible from outside, and no weight is stale."""

import copy
import threading

import keras
import numpy as np
import pytest

import keras_slsam

torch = pytest.importorskip("torch")
if keras.config.backend() != "torch":
    pytest.skip("modules of PyTorch", allow_module_level=True)

from torch import nn  # noqa: E402

X = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
Y = np.zeros((6, 5), "float32")
RATE, RHO = 0.1, 0.5


def compiled(module, optimizer=None, loss="mse", inputs=(5,)):
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 5))
    model = keras.Sequential([keras.Input(inputs), wrapper])
    model = keras_slsam.sharpness_aware(model)
    base = keras.optimizers.SGD(RATE)
    optimizer = optimizer or keras_slsam.SAM(base, rho=RHO)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def step(model, x=X):
    return keras_slsam.step(
        model, model.optimizer, (torch.tensor(x), torch.tensor(Y[: len(x)]))
    )


def sam_by_hand(module, x=X):
    """Takes a step of SAM around SGD in plain PyTorch."""
    weights = list(module.parameters())
    x, y = torch.tensor(x), torch.tensor(Y)

    def gradients():
        loss = (module(x) - y).square().mean()
        return torch.autograd.grad(loss, weights)

    first = gradients()
    norm = sum(g.square().sum() for g in first).sqrt()
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, first):
            w.add_(RHO * g / norm)
    second = gradients()
    with torch.no_grad():
        for w, old, g in zip(weights, before, second):
            w.copy_(old - RATE * g)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_buffers_are_those_of_the_whole_batch_and_change_once(fraction):
    module = nn.BatchNorm1d(5)
    step(compiled(module, keras_slsam.SAM("sgd", ascent_fraction=fraction)))
    assert module.num_batches_tracked == 1
    np.testing.assert_allclose(module.running_mean, 0.1 * X.mean(0), rtol=1e-5)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.weight = nn.Parameter(torch.randn(5, 5))


class InAList(Base):
    def __init__(self):
        super().__init__()
        self.weights = [self.inner.weight, self.inner.bias, self.weight]

    def forward(self, x):
        kernel, bias, other = self.weights
        return torch.cat([x, x @ kernel.T + bias, x @ other], 1)[:, 5:10] @ other


class InAClosure(Base):
    def __init__(self):
        super().__init__()
        kernel, bias, other = self.inner.weight, self.inner.bias, self.weight
        self.function = lambda x: torch.tanh(x @ kernel.T + bias) @ other

    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, x):
        return self.function(x)


class Checkpointed(Base):
    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        def function(x):
            return torch.tanh(self.inner(torch.tanh(x @ self.weight)))

        return checkpoint(function, x, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, 0]


class Tied(Base):
    def __init__(self):
        super().__init__()
        self.inner.weight = self.weight

    def forward(self, x):
        return torch.tanh(self.inner(x)) @ self.weight


class ByStateDict(Base):
    def forward(self, x):
        weights = dict(self.inner.named_parameters())
        assert len(self.state_dict()) == 3
        return torch.func.functional_call(self.inner, weights, x) @ self.weight


class WithAGradient(Base):
    """Differentiates in the forward pass, with respect to its input and a weight."""

    def forward(self, x):
        x = x.requires_grad_()
        energy = torch.tanh(self.inner(x) @ self.weight).sum()
        by = x, self.inner.weight
        force, other = torch.autograd.grad(energy, by, create_graph=True)
        return force + other.sum()


class WithATransform(Base):
    def forward(self, x):
        return torch.vmap(lambda row: torch.tanh(self.inner(row)) @ self.weight)(x)


class WithATransformOfWeights(Base):
    def forward(self, x):
        def energy(weights):
            return torch.func.functional_call(self.inner, weights, x).square().sum()

        gradient = torch.func.grad(energy)(dict(self.inner.named_parameters()))
        return self.inner(x) @ self.weight + gradient["bias"]


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WithAFunction(Base):
    def forward(self, x):
        return torch.tanh(self.inner(x)) @ Identity.apply(self.weight)


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)))


def old_weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 5)))


def orthogonal():
    return nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))


def hooked():
    module = nn.Linear(5, 5)
    module.register_forward_hook(lambda module, args, y: y @ module.weight)
    module.register_full_backward_hook(lambda module, given, found: (given[0] * 2,))
    return nn.Sequential(nn.Linear(5, 5), module)


def attention():
    return nn.TransformerEncoderLayer(5, 1, 7, dropout=0.0, batch_first=True)


WAYS = [
    InAList,
    InAClosure,
    Checkpointed,
    Recurrent,
    Tied,
    ByStateDict,
    WithAGradient,
    WithATransform,
    weight_norm,
    orthogonal,
    hooked,
    attention,
]


@pytest.mark.parametrize("make", WAYS)
def test_a_weight_is_perturbed_however_it_is_read(make):
    torch.manual_seed(0)
    module = make()
    by_hand = copy.deepcopy(module)
    model = compiled(module)
    for _ in range(2):
        sam_by_hand(by_hand)
        step(model)
    for weight, other in zip(module.parameters(), by_hand.parameters()):
        torch.testing.assert_close(weight, other)


class Predicts(nn.Module):
    """A module that another thread uses in the middle of a step."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.thread = threading.get_ident()
        self.seen = []

    def use(self):
        self.seen.append(self.inner.eval()(torch.tensor(X)).detach())
        assert "forward" not in vars(self) and copy.deepcopy(self.inner)
        self.inner.train()

    def forward(self, x):
        result = self.inner(x)
        thread = threading.Thread(target=self.use)
        thread.start(), thread.join()
        return result


def test_another_thread_sees_nothing_of_a_step():
    module = Predicts()
    expected = module.inner.eval()(torch.tensor(X)).detach()
    model = compiled(module)
    module.seen.clear()
    step(model)
    assert len(module.seen) == 2  # in each pass
    for seen in module.seen:
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)


class Momentum(nn.Module):
    """A momentum encoder whose key follows its query in the forward pass."""

    def __init__(self, moves):
        super().__init__()
        self.query, self.key = nn.Linear(5, 5), nn.Linear(5, 5)
        self.moves = moves
        self.key.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for query, key in zip(self.query.parameters(), self.key.parameters()):
                self.moves(key, query)
        return self.query(x) - self.key(x)


def set_data(key, query):
    key.data = 0.5 * key.data + 0.5 * query.data


MOVES = [
    lambda key, query: key.lerp_(query, 0.5),
    lambda key, query: key.mul_(0.5).add_(query, alpha=0.5),
    lambda key, query: key.data.mul_(0.5).add_(query.data, alpha=0.5),
    lambda key, query: torch.lerp(key, query, 0.5, out=key),
    lambda key, query: torch._foreach_lerp_([key], [query], 0.5),
    set_data,
]


@pytest.mark.parametrize("moves", MOVES)
def test_weights_that_a_module_updates_are_updated_once_from_unperturbed_ones(moves):
    torch.manual_seed(0)
    module = Momentum(moves)
    expected = [
        0.5 * key + 0.5 * query
        for key, query in zip(module.key.parameters(), module.query.parameters())
    ]
    step(compiled(module, keras_slsam.SAM("sgd", rho=10.0)))
    for key, value in zip(module.key.parameters(), expected):
        torch.testing.assert_close(key, value)
        assert not key.requires_grad


class Writes(Base):
    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def forward(self, x):
        with torch.no_grad():
            self.writes(self.weight)
        return self.inner(x) @ self.weight


@pytest.mark.parametrize(
    "writes",
    [
        lambda weight: weight.clamp_(-0.1, 0.1),
        lambda weight: torch.mul(weight, 2.0, out=weight),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: torch._foreach_mul_([weight], 2.0),
    ],
)
def test_a_module_that_writes_to_a_trained_weight_is_refused(writes):
    module = Writes(writes)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"writes to the trainable.*'weight' of layer"):
        step(compiled(module))
    assert torch.equal(module.weight, before)
    model = compiled(Writes(lambda weight: weight.data.clamp_(-0.1, 0.1)))
    with pytest.raises(ValueError, match=r"writes to the trainable.*'weight' of layer"):
        step(model)


class KeptValue(keras.layers.Layer):
    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(5, 5), name="kernel")
        self.kept = self.kernel.value

    def call(self, x):
        return x @ self.kept


@pytest.mark.filterwarnings("ignore:`SLSAM` found a single arm:UserWarning")
def test_a_weight_that_cannot_be_perturbed_is_refused():
    for make in (WithATransformOfWeights, WithAFunction):
        module = make()
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=r"depends on.*eight' of layer"):
            step(compiled(module))
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(5, 5), torch.zeros(1, 5)))
    with pytest.raises(ValueError, match=r"'0' of layer.*torch.jit"):
        step(compiled(scripted))
    scripted = nn.Sequential(nn.Linear(5, 5), scripted.requires_grad_(False))
    step(compiled(scripted))  # not trained
    model = keras.Sequential([keras.Input((5,)), KeptValue()])
    model.compile(keras_slsam.SLSAM("sgd", active_fraction=0.5, seed=0), loss="mse")
    with pytest.raises(ValueError, match="depends on.*kernel"):
        step(model)


def test_replicas_are_refused():
    module = nn.DataParallel(nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"'DataParallel' of layer.*module.module"):
        step(compiled(module))


def test_a_parameter_that_keras_does_not_know_is_refused():
    module = nn.Linear(5, 5)
    model = compiled(module)
    step(model)
    module.bias = nn.Parameter(module.bias.detach().clone())
    with pytest.raises(ValueError, match=r"'bias' of layer.*not a weight of the Keras"):
        step(model)
    module.bias.requires_grad_(False)
    step(model)


def test_modules_that_are_tied_after_they_are_wrapped():
    one, other = nn.Linear(5, 5), nn.Linear(5, 5)
    model = compiled(nn.Sequential(one, other))
    other.weight = one.weight
    before = one.weight.detach().clone()
    step(model)
    assert not torch.equal(one.weight, before)


def test_hooks_of_a_weight_see_its_gradient():
    def trained(optimizer):
        torch.manual_seed(0)
        module = nn.Linear(5, 5)
        module.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        model = compiled(module, optimizer)
        model.train_on_batch(X, Y)
        return module.weight.detach()

    plain = trained(keras.optimizers.SGD(RATE))
    ours = trained(keras_slsam.SAM(keras.optimizers.SGD(RATE), rho=1e-9))
    torch.testing.assert_close(ours, plain)


class Fails(nn.Module):
    """Raises in its n-th call, after it has drawn numbers and changed buffers."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.generator = torch.Generator()

    def forward(self, x):
        self.calls += 1
        x = self.inner(x) + torch.rand(()) + torch.rand((), generator=self.generator)
        if self.calls == self.at:
            raise RuntimeError("in the middle of a step")
        return x + np.random.normal()


@pytest.mark.parametrize("call", [1, 2])
def test_modules_and_generators_are_restored_if_a_step_raises(call):
    module = Fails(call)
    model = compiled(module)
    frozen = [weight.requires_grad for weight in module.parameters()]
    before = copy.deepcopy(module.state_dict()), dict(vars(module))
    states = torch.get_rng_state(), module.generator.get_state(), np.random.get_state()
    with pytest.raises(RuntimeError, match="middle of a step"):
        step(model)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[0][name])
    assert vars(module).keys() == before[1].keys()
    assert frozen == [weight.requires_grad for weight in module.parameters()]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(module.generator.get_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2][1])
    step(model)


def test_a_layer_may_have_the_same_name_as_a_generator():
    class Generator(nn.Linear):
        pass

    step(compiled(nn.Sequential(Generator(5, 5))))


class WithACheckpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(
            lambda x: self.a(x).tanh(), x.requires_grad_(), use_reentrant=True
        )
        return self.o(x)


def test_a_reentrant_checkpoint_is_refused():
    for optimizer in (None, keras_slsam.S2SAM("sgd")):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            step(compiled(WithACheckpoint(), optimizer))


class WithACounter(nn.Module):
    def __init__(self):
        super().__init__()
        self.o = nn.Linear(5, 5)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n = self.n + 1
        return self.o(x)


def test_a_buffer_that_is_replaced_is_updated_once():
    module = WithACounter()
    model = compiled(module)
    before = float(module.n)
    step(model)
    first = float(module.n) - before
    step(model)
    assert first == 1
    assert float(module.n) == before + 2


def test_sparse_gradients_of_an_embedding():
    weights = []
    for optimizer in ("sgd", keras_slsam.SAM("sgd", rho=1e-9)):
        torch.manual_seed(0)
        module = nn.Embedding(10, 3, sparse=True)
        model = keras.Sequential(
            [keras.Input((2,), dtype="int32"), keras.layers.TorchModuleWrapper(module)]
        )
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer, loss="mse")
        model.train_on_batch(np.array([[1, 2], [1, 3]]), np.ones((2, 2, 3), "float32"))
        weights.append(module.weight.detach().clone())
    torch.testing.assert_close(*weights)

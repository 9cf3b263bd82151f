"""Values and gradients of every loss against TextBrewer's, run live on the same numbers.

TextBrewer's own functions give the references but for two: it selects logits before the KD losses,
so their masked reference selects in torch; and its package divides masked NST by the length where
its repository divides by each side's width, so masked ``mmd_loss`` has a reference here.
"""

import jax
import numpy as np
import pytest
import textbrewer.losses
import torch

from jaxbrewer import losses

pytestmark = pytest.mark.torch

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
MASKS = ["none", "ones", "bool", "float", "ragged"]
# Every mask in double precision, where a wrong formula cannot hide; the main ones in single.
RUNS = [(mask, "float64") for mask in MASKS] + [(m, "float32") for m in ("none", "bool", "float")]

torch.set_num_threads(1)


def masked_mmd(state_S, state_T, mask):
    """NST over pairs of weighted positions, each Gram matrix over its own width."""
    grams = [x @ y.transpose(1, 2) / x.size(2) for x, y in (state_S, state_T)]
    mask = mask.to(grams[0])
    pairs = mask[:, :, None] * mask[:, None, :]
    return ((grams[0] - grams[1]) ** 2 * pairs).sum() / pairs.sum()


def selected_kd(name):
    def loss(logits_S, logits_T, temperature, mask=None):
        if mask is not None:
            mask = mask.to(torch.bool)
            logits_S, logits_T = logits_S[mask], logits_T[mask]
            if torch.is_tensor(temperature) and temperature.dim():
                temperature = temperature[mask]
        return getattr(textbrewer.losses, name)(logits_S, logits_T, temperature)

    return loss


def reference(name, mask):
    if name.startswith("kd"):
        return selected_kd(name)
    if name == "mmd_loss" and mask is not None:
        return masked_mmd
    return getattr(textbrewer.losses, name)


def make_mask(kind, rng, batch, length):
    """A mask in which every example has a position."""
    if kind == "none":
        return None
    if kind == "ones":
        return np.ones((batch, length), np.int64)
    if kind == "ragged":
        return (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.int32)
    mask = rng.integers(0, 2, (batch, length))
    mask[np.arange(batch), rng.integers(0, length, batch)] = 1
    if kind == "float":
        return (mask * rng.uniform(0.1, 2, mask.shape)).astype(np.float32)
    return mask.astype(np.bool_)


def normal(rng, *shape):
    return rng.normal(0, 1.5, shape)


def scores(rng, mask, *shape):
    """Raw attention scores, very negative at some keys, as a model's own mask leaves them."""
    padded = rng.random(shape[-1]) < 0.2 if mask is None else (mask == 0)
    if mask is not None:
        padded = padded[:, None, None, :] if len(shape) == 4 else padded[:, None, :]
    return normal(rng, *shape) - 1e4 * padded


def make_inputs(form, rng, mask, batch, length):
    """(S, T) of a form, in float64."""
    if form == "attention":
        heads = int(rng.integers(1, 4))
        return tuple(scores(rng, mask, batch, heads, length, length) for _ in range(2))
    if form == "attention, other heads":
        return tuple(scores(rng, mask, batch, heads, length, length) for heads in (2, 3))
    if form == "attention without heads":
        return tuple(scores(rng, mask, batch, length, length) for _ in range(2))
    width = int(rng.integers(2, 8))
    if form == "layers":
        return tuple([normal(rng, batch, length, width) for _ in range(2)] for _ in range(2))
    if form == "layers, other widths":
        widths = (width, width + 3)
        return tuple([normal(rng, batch, length, w) for _ in range(2)] for w in widths)
    if form == "layers, two widths":
        widths = (width, width + 3)
        return tuple([normal(rng, batch, length, w) for w in widths] for _ in range(2))
    if form == "first, pooled":
        return normal(rng, batch, length, width), normal(rng, batch, width)
    shape = {"pooled": (batch, width), "states": (batch, length, width)}[form]
    return normal(rng, *shape), normal(rng, *shape)


MATCHES = [
    ("att_mse_loss", "attention"),
    ("att_mse_sum_loss", "attention, other heads"),
    ("att_mse_sum_loss", "attention without heads"),
    ("att_ce_loss", "attention"),
    ("att_ce_mean_loss", "attention, other heads"),
    ("att_ce_mean_loss", "attention without heads"),
    ("hid_mse_loss", "states"),
    ("cos_loss", "states"),
    ("pkd_loss", "states"),
    ("pkd_loss", "pooled"),
    ("pkd_loss", "first, pooled"),
    ("fsp_loss", "layers"),
    ("fsp_loss", "layers, two widths"),
    ("mmd_loss", "layers"),
    ("mmd_loss", "layers, other widths"),
]


def check(name, inputs, dtype, mask=None, **more):
    """Compares value and gradients, with respect to both sides, at ``dtype``."""
    inputs = jax.tree.map(lambda x: x.astype(dtype), inputs)
    ours = getattr(losses, name)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda S, T: ours(S, T, **more, mask=mask), argnums=(0, 1))
    )(*inputs)
    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), inputs)
    more = jax.tree.map(lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x, more)
    mask = None if mask is None else torch.tensor(mask)
    expected = reference(name, mask)(*tensors, **more, mask=mask)
    expected.backward()
    assert value.dtype == dtype and value.shape == ()
    pairs = [(value, expected.detach())]
    pairs += [
        (ours, tensor.grad)
        for ours, tensor in zip(jax.tree.leaves(gradients), jax.tree.leaves(tensors), strict=True)
    ]
    for ours, theirs in pairs:
        theirs = theirs.numpy()
        error = np.abs(np.asarray(ours) - theirs).max()
        assert error <= TOLERANCE[dtype] * np.abs(theirs).max()


@pytest.fixture
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


both = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
runs = pytest.mark.parametrize(("kind", "dtype"), RUNS, indirect=["dtype"])


@runs
@pytest.mark.parametrize(("name", "form"), MATCHES)
def test_match_loss(name, form, kind, dtype):
    rng = np.random.default_rng([MATCHES.index((name, form)), MASKS.index(kind)])
    batch, length = int(rng.integers(1, 4)), int(rng.integers(2, 9))
    mask = make_mask(kind, rng, batch, length)
    check(name, make_inputs(form, rng, mask, batch, length), dtype, mask)


@runs
@pytest.mark.parametrize(
    ("form", "temperature"),
    [("states", "number"), ("states", "by position"), ("pooled", "by position")],
)
@pytest.mark.parametrize("name", ["kd_ce_loss", "kd_mse_loss"])
def test_kd_loss(name, form, temperature, kind, dtype):
    rng = np.random.default_rng([len(name), len(form), len(temperature), MASKS.index(kind)])
    batch, length = int(rng.integers(2, 5)), int(rng.integers(2, 9))
    mask = make_mask(kind, rng, batch, length)
    inputs = make_inputs(form, rng, mask, batch, length)
    if form == "pooled" and mask is not None:
        mask = mask[:, 0]
        mask[0] = 1
    positions = inputs[0].shape[:-1]
    temperature = 3.0 if temperature == "number" else rng.uniform(1, 8, positions).astype(dtype)
    check(name, inputs, dtype, mask, temperature=temperature)


@pytest.mark.parametrize("temperature", ["number", "by position"])
@pytest.mark.parametrize("masked", [False, True])
def test_binary_kd_loss(temperature, masked, x64):
    """TextBrewer has none: value and gradients against torch's formula."""
    rng = np.random.default_rng(masked)
    S, T = rng.normal(0, 5, (2, 3, 4, 5))
    t = 3.0 if temperature == "number" else rng.uniform(1, 8, (3, 4))
    mask = rng.integers(0, 2, (3, 4)) if masked else None
    ours = jax.value_and_grad(losses.kd_bce_loss, (0, 1))(S, T, t, mask)
    theirs = [torch.tensor(x, requires_grad=True) for x in (S, T)]
    scale = torch.as_tensor(t) if temperature == "number" else torch.tensor(t)[..., None]
    chosen = torch.ones(3, 4) if mask is None else torch.tensor(mask)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        (theirs[0] / scale)[chosen != 0], torch.sigmoid(theirs[1] / scale)[chosen != 0]
    )
    wanted.backward()
    np.testing.assert_allclose(ours[0], wanted.item(), rtol=1e-12)
    for found, x in zip(ours[1], theirs, strict=True):
        np.testing.assert_allclose(found, x.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [None, 2, 12])
def test_relation_loss(heads, masked, x64):
    """TextBrewer has none: value and gradients against torch's formula, example by example."""
    rng = np.random.default_rng(masked)
    S, T = rng.normal(0, 1.5, (3, 6, 5, 2)), rng.normal(0, 1.5, (3, 4, 5, 6))
    lengths = [5, 3, 0] if masked else [5, 5, 5]
    mask = np.arange(5) < np.array(lengths)[:, None] if masked else None
    ours = jax.value_and_grad(lambda S, T: losses.relation_loss(S, T, mask, heads=heads), (0, 1))(
        S, T
    )
    theirs = [torch.tensor(x, requires_grad=True) for x in (S, T)]
    total, count = 0, heads or 4
    for example, length in enumerate(filter(None, lengths)):
        log = []
        for side in theirs:
            cut = side[example, :, :length].transpose(0, 1).reshape(length, count, -1)
            scores = cut.transpose(0, 1) @ cut.permute(1, 2, 0) / cut.shape[-1] ** 0.5
            log.append(torch.log_softmax(scores, -1))
        total += torch.nn.functional.kl_div(*log, reduction="sum", log_target=True)
    wanted = total / (count * sum(lengths))
    wanted.backward()
    np.testing.assert_allclose(ours[0], wanted.item(), rtol=1e-9)
    for found, x in zip(ours[1], theirs, strict=True):
        np.testing.assert_allclose(found, x.grad.numpy(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("name", "form"), MATCHES)
def test_one_position_of_one_example(name, form, x64):
    mask = None if name == "pkd_loss" else np.ones((1, 1), np.int64)
    check(name, make_inputs(form, np.random.default_rng(0), mask, 1, 1), "float64", mask)


@both
def test_cosine_of_zero_vectors(dtype):
    """torch adds an epsilon to both norms, which decides value and gradient there."""
    rng = np.random.default_rng(0)
    S, T = make_inputs("states", rng, None, 2, 6)
    S[0, :3] = 0
    T[0, 2:5] = 0
    S[1, 0] *= 1e-6
    check("cos_loss", (S, T), dtype)
    check("cos_loss", (S, T), dtype, np.array([[1, 0, 1, 0, 1, 0]] * 2))


@both
@pytest.mark.parametrize("name", ["att_ce_loss", "att_ce_mean_loss", "att_mse_loss"])
def test_scores_around_the_padding_threshold(name, dtype):
    """Without a mask, -0.001 itself counts as padding."""
    rng = np.random.default_rng(0)
    values = np.array([-1e4, -0.5, -0.0011, -1e-3, -0.0009, 0.0, 0.5], dtype)
    check(name, tuple(rng.choice(values, (2, 2, 6, 6)) for _ in range(2)), dtype)


# --- sentence-transformers' losses, of which TextBrewer has none ----------------------------------


def as_dot_products(scores):
    """Embeddings of queries and of their candidates whose dot products are the scores."""
    query = torch.ones(len(scores), 1, dtype=scores.dtype)
    return [query, *(scores[:, i : i + 1] for i in range(scores.shape[1]))]


def theirs_on_scores(loss, S, T):
    """The value of a loss of sentence-transformers on scores, and the gradient of the student's."""
    S = torch.tensor(S, requires_grad=True)
    value = loss.compute_loss_from_embeddings(as_dot_products(S), torch.tensor(T))
    value.backward()
    return value, S.grad


@pytest.mark.parametrize("candidates", [2, 5])
@pytest.mark.parametrize("temperatures", [None, (1.0, 1.0), (3.0, 3.0), (0.5, 2.0)])
def test_losses_on_scores_equal_sentence_transformers(candidates, temperatures, x64):
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss

    S, T = np.random.default_rng(candidates).normal(0, 3, (2, 4, candidates))
    if temperatures is None:
        theirs, ours = MarginMSELoss(None), losses.kd_margin_mse_loss
    else:
        t_S, t_T = temperatures
        theirs = DistillKLDivLoss(None, student_temperature=t_S, teacher_temperature=t_T)

        def ours(S, T):
            return losses.kd_listwise_kl_loss(S, T, t_S, temperature_T=t_T)

        if t_S == t_T:
            same = losses.kd_listwise_kl_loss(S, T, t_S)
            np.testing.assert_allclose(same, ours(S, T), rtol=1e-12)
    value, gradient = jax.value_and_grad(ours)(S, T)
    wanted, wanted_gradient = theirs_on_scores(theirs, S, T)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-9)
    np.testing.assert_allclose(gradient, wanted_gradient.numpy(), rtol=1e-6, atol=1e-12)


def test_scores_under_a_mask_are_selected(x64):
    S, T = np.random.default_rng(0).normal(0, 3, (2, 4, 3))
    mask = np.array([1, 0, 1, 1])
    temperature = np.array([1.0, np.nan, 2.0, 0.5])
    for loss in (losses.kd_margin_mse_loss, losses.kd_listwise_kl_loss):
        wanted = loss(S[mask == 1], T[mask == 1], temperature[mask == 1])
        np.testing.assert_allclose(loss(S, T, temperature, mask), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("metric", "name"), [("cosine", "cos_loss"), ("l2", "l2_loss"), ("mse", "hid_mse_loss")]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
def test_losses_on_embeddings_equal_sentence_transformers(metric, name, dtype):
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

    S, T = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(dtype)
    S[1] = T[1]  # where torch's norm has the gradient 0
    theirs = torch.tensor(S, requires_grad=True)
    wanted = EmbedDistillLoss(None, metric).compute_loss_from_embeddings(
        [theirs], [torch.tensor(T)]
    )
    wanted.backward()
    value, gradient = jax.value_and_grad(getattr(losses, name))(S, T)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)
